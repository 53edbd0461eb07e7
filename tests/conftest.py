"""Tiny random models and a byte-level tokenizer with a chat template: breadth without downloads."""

import os


# No test may ask a hub: it fails at once. The variable must be set before huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


# Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from tiny import make_tokenizer


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()
