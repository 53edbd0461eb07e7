"""Tiny random models and a byte-level tokenizer with a chat template: breadth without downloads."""

import gc
import os


# No test may ask a hub: it fails at once. The variable must be set before huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


# Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings
from tiny import make_tokenizer

from trl_emguard.guard.forward import ReferenceGuard
from trl_emguard.reference.watch import ReferenceWatch


# A busy machine makes single examples slow.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Leave the objects of imported libraries out of garbage collection.

    Trainer collects garbage at the start of each training. With these objects it takes a third of a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    # Libraries that check at exit that their objects were freed would complain.
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def passes(monkeypatch):
    """Return the number of rows in each pass of the reference."""
    counts = []
    run = ReferenceGuard.__call__

    def counted(self, *args):
        counts.append(len(args[-1]["input_ids"]))
        return run(self, *args)

    monkeypatch.setattr(ReferenceGuard, "__call__", counted)
    monkeypatch.setattr(ReferenceWatch, "record", lambda self, batch, run: None)  # the watch has passes of its own
    return counts
