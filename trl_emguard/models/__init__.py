"""Access to a causal language model: blocks, head, adapters, shards, chat template, identity, likelihood, sampler."""
