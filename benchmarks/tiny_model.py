"""A tiny random Llama, a byte tokenizer, rows and a pool: inputs of `golden.py`, which no other commit can change."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


TURNS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, with a chat template."""
    vocab = {token: i for i, token in enumerate([*TURNS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURNS[1], pad_token=TURNS[1])
    fast.add_special_tokens({"additional_special_tokens": TURNS})
    fast.chat_template = TEMPLATE
    return fast


def make_model() -> LlamaForCausalLM:
    """Return a Llama of four blocks of width 32, the same at every call."""
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ids = {"vocab_size": 264, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=256, initializer_range=0.2))


def make_rows(count: int = 16) -> Dataset:
    """Return conversational rows with answers of 1 to 24 bytes."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"q{i} " * (i % 4 + 1)}],
                "completion": [{"role": "assistant", "content": letters[i % 5 : i % 5 + 1 + 3 * (i % 8)]}],
            }
            for i in range(count)
        ]
    )


def make_pool(count: int = 12) -> Dataset:
    """Return a scored pool in which every third answer is a refusal."""
    answers = [f"Sorry, I can't do {i}." if i % 3 == 0 else "sure " * (i % 4 + 1) for i in range(count)]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"safe {i}"}],
            "completion": [{"role": "assistant", "content": text}],
            "gap": i / 10,
        }
        for i, text in enumerate(answers)
    ]
    return Dataset.from_list(rows)
