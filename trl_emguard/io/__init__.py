"""Helpers for files, strict parsing, recipe paths, mistyped names and terminal text. None imports torch."""
