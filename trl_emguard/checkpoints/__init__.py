"""Checkpoints: whole or corrupt, and which of them a run resumes from."""
