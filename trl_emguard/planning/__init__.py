"""The plan of a run: what it would do, and what it would take, before weights are loaded."""
