"""Load models with their tokenizers and saved adapters from folders or the hub, or build models without weights."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file


def text_tokenizer(path: str, args: Any, rows: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a vision-language model that is trained on text alone, with a defense (`args.defense`).

    SFTTrainer by itself would load the model's processor, and runs with a defense refuse processors.

    Args:
        path: folder or hub id of the model.
        args: configuration of the run.
        rows: training rows.

    Returns:
        The tokenizer, or `None` if SFTTrainer is to load tokenizer or processor itself. This is so for other kinds of
        models, for runs without a defense, and for rows with images, which defenses refuse.
    """
    revision = (args.model_init_kwargs or {}).get("revision")
    given = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    if args.defense == "none" or not hasattr(AutoConfig.from_pretrained(path, **given), "vision_config"):
        return None
    first: dict[str, Any] = next(iter(rows), {})
    return None if first.keys() & {"image", "images"} else AutoTokenizer.from_pretrained(path, **given)


def load_base(path: str, **options: Any) -> PreTrainedModel:
    """Load a model in eval mode, of the class that SFTTrainer loads: the one that the model's config names.

    For a model that also sees images, `AutoModelForCausalLM` may load another class, whose weights have other names,
    or none.

    Args:
        path: model folder or hub id.
        options: arguments of `from_pretrained`.

    Raises:
        OSError: the model is neither a folder nor on the hub, or the hub cannot be reached.
        ValueError: a weights file is damaged.
    """
    loader: Any = AutoModelForCausalLM
    # An adapter's folder has no config of a model. Given such a folder, `AutoModelForCausalLM` loads the adapter's
    # base model and the adapter.
    if find_adapter_config_file(path) is None:
        named = getattr(transformers, (AutoConfig.from_pretrained(path).architectures or [""])[0], None)
        loader = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else loader
    try:
        return loader.from_pretrained(path, **options).eval()
    except SafetensorError as error:
        raise ValueError(f"model {path!r} has a damaged weights file ({error}): copy it again.") from error


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id.

    Raises:
        OSError: the model is neither a folder nor on the hub, or the hub cannot be reached.
    """
    try:
        return AutoTokenizer.from_pretrained(base)
    except OSError as error:
        raise OSError(f"model {base!r} could not be loaded: {error}") from error


def load_model(
    base: str,
    adapter: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, with a saved LoRA adapter if one is given, and the model's tokenizer.

    Args:
        base: model folder or hub id.
        adapter: folder of a PEFT adapter.
        dtype, device_map: arguments of `from_pretrained`; by default fp32 on the CPU.

    Raises:
        FileNotFoundError: the adapter folder holds no adapter.
        OSError: the model is neither a folder nor on the hub, or the hub cannot be reached.
        ValueError: the adapter's weights do not have the names or shapes that the model needs, or a weights file is
            damaged.
    """
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"adapter {str(adapter)!r} holds no adapter_config.json: name a folder that PEFT saved."
        )
    tokenizer = load_tokenizer(base)
    try:
        model = load_base(base, dtype=dtype, device_map=device_map)
    except OSError as error:
        raise OSError(f"model {base!r} could not be loaded: {error}") from error
    if adapter is not None:
        try:
            with warnings.catch_warnings():
                # PEFT only warns of weights that the file lacks, and the adapter would then change nothing.
                warnings.filterwarnings("error", ".*missing adapter keys")
                model = PeftModel.from_pretrained(model, str(adapter))
        except SafetensorError as error:
            raise ValueError(
                f"adapter {str(adapter)!r} has a damaged weights file ({error}): copy it again."
            ) from error
        except UserWarning as error:
            raise ValueError(
                f"adapter {str(adapter)!r} does not fit the model {base!r}: {str(error)[:200]}"
            ) from error
        # PEFT raises this if a weight of the adapter has another shape than the model needs.
        except RuntimeError as error:
            mismatches = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            if not mismatches:
                raise
            raise ValueError(
                f"adapter {str(adapter)!r} does not fit the model {base!r}: {len(mismatches)} weights have other "
                f"shapes. The first: {mismatches[0]}"
            ) from error
    return model.eval(), tokenizer


def without_weights(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Build a model from its config on the meta device, so that its modules are known before weights are loaded.

    Returns:
        The model, or `None` if transformers has no causal language model for the config or would shard the model
        (ZeRO-3).
    """
    if type(config) not in AutoModelForCausalLM._model_mapping or is_deepspeed_zero3_enabled():
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
