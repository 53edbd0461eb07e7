"""Tiny random models and a byte-level tokenizer with a chat template: breadth without downloads."""

import os


# A test that asks a hub is at fault, and should fail at once. Set before anything imports huggingface_hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


# Triton's kernels run in its interpreter where there is no GPU. Read when Triton is first imported, which torch puts
# off.
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
