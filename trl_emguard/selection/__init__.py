"""Selection of safe rows to mix into the training data: score a pool of rows by perplexity gap, and choose from it.

The gap says how much less likely a row's answer is under misaligned models than under the aligned base model. Neither
step needs a trainer.
"""
