"""Comparison of defenses: the same training once per option set and seed, one evaluation, one report."""
