"""Helpers for files, parsers and folders, which do not need torch."""
