"""Access to a causal language model: its decoder blocks, output head, adapters, sharded weights and chat template.

Other modules identify a model by hashes of samples of its weights (`identity`), measure the likelihood of given
answers (`likelihood`), sample answers (`sampler`), and load models or change saved adapters.
"""
