"""Safe rows for interleaving: score a pool by its perplexity gap, and choose. No trainer is needed."""
