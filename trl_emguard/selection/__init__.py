"""Safe rows for interleaving: score a pool by its perplexity gap, and choose. Works on models and rows, never on a trainer."""
