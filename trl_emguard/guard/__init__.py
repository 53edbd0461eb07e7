"""Patched forward that computes the loss of a defended step: reference pass, policy pass, output head, loss terms."""
