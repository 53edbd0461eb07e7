"""A causal language model taken apart: blocks, head, adapters, shards, chat template, likelihood."""
