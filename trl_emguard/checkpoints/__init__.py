"""Checkpoints: marking complete ones, recognising corrupt ones, and finding the checkpoint to resume from."""
