"""Checkpoints: writing whole ones, recognising corrupt ones, and finding the one that a run resumes from."""
