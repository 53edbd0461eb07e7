"""Models with their tokenizers and saved adapters, loaded from folders or the hub."""

import os
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    base: str,
    adapter: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, with a saved LoRA adapter on it where one is given. The model is in eval mode.

    Args:
        base: model folder or hub id.
        adapter: folder of a PEFT adapter.
        dtype, device_map: arguments of `from_pretrained`; by default fp32 on the CPU.

    Raises:
        FileNotFoundError: the adapter folder holds no adapter.
    """
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"adapter {str(adapter)!r} holds no adapter_config.json: name a folder that PEFT saved."
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=device_map)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval(), tokenizer
