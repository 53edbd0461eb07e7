"""Safe rows for interleaving: score a pool by its perplexity gap and choose rows from it, without a trainer."""
