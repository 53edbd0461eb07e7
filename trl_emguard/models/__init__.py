"""A causal language model in parts: blocks, head, adapters, shards, chat template, identity, likelihood, sampler."""
