"""The guarded forward: reference pass, policy pass, head and terms in one call."""
