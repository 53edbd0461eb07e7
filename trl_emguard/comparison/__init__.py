"""Comparison of defenses: the same training for each set of options and seed, then one evaluation and one report."""
