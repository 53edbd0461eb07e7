"""Safe rows for interleaving: score a pool of rows by perplexity gap, and choose rows from it, without a trainer."""
