"""Selection of safe rows for interleaving: score a pool of rows by perplexity gap, and choose rows from the pool.

The gap says how much less likely a row's answer is under misaligned models than under the aligned base model. Neither
step needs a trainer.
"""
