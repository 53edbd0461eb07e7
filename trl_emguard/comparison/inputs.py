"""Content of the files and folders that a run reads. If this content changes, the run is trained again."""

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


# Every existing file or folder that an option names counts as an input ([`contents`]). The options listed here are
# excepted: their values name outputs, or are not paths at all. The option `env` sets environment variables, many of
# them naming outputs.
OUTPUTS = (
    *("output_dir", "log_dir", "cache_dir", "offload_folder", "offload_optimizer_nvme_path"),
    *("offload_param_nvme_path", "env", "report_to", "run_name", "project", "hub_model_id"),
)
# Options whose value is a word, such as `train` or `steps`. A folder of that name may lie in the working directory.
WORDS = (
    *("defense", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_text_field", "split"),
    *("interleave_config", "interleave_split", "interleave_where", "inoculation_prompt", "eos_token", "pad_token"),
    *("attn_implementation", "dtype", "revision", "model_revision", "hub_revision", "hub_token", "hub_strategy"),
    *("kl_direction", "kl_tokens", "ldifs_layers", "steering_layers", "steering_mode", "steering_tokens"),
    *("inoculation_mode", "inoculation_rows", "loss_type", "truncation_mode", "packing_strategy", "optim"),
    *("lr_scheduler_type", "optim_target_modules", "lora_target_modules", "lora_target_parameters"),
    *("lora_modules_to_save", "lora_task_type", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "save_strategy"),
    *("eval_strategy", "logging_strategy", "log_level", "log_level_replica", "metric_for_best_model", "label_names"),
    *("length_column_name", "include_for_metrics", "train_sampling_strategy", "torch_compile_backend"),
    *("torch_compile_mode", "ddp_backend", "dataloader_multiprocessing_context", "debug"),
)
NOT_READ = OUTPUTS + WORDS


def contents(options: Mapping[str, Any], output_dir: Path) -> list[str | list[Any]]:
    """Return, for each file and folder that options name, the file's hash or a list of the folder's files.

    Args:
        options: a run's options with the recipe's, without those that the run does not read.
        output_dir: folder of the comparison, whose files do not count in a folder that contains it.
    """
    named = itertools.chain(*(_texts(value) for name, value in options.items() if name not in NOT_READ))
    found = {path for text in named for path in _paths(text)}
    return [_content(path, output_dir.resolve()) for path in sorted(found)]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in an option's value, also from nested lists and mappings, as in the option `datasets`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part) if name not in NOT_READ else ()
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _paths(text: str) -> list[Path]:
    """Return the files and folders that a text names, directly or by a pattern (`*.jsonl`)."""
    if not 0 < len(text) < 256:  # an empty text is no path, and one of 256 characters or more is taken for a prompt
        return []
    name = os.path.expanduser(text)
    return [path for path in {Path(name), *map(Path, glob.glob(name, recursive=True))} if os.path.exists(path)]


def _content(path: Path, own: Path) -> str | list[Any]:
    """Return a file's hash, or a list with the name, size and modification time of each file inside a folder.

    Args:
        path: the file or folder.
        own: folder of the comparison. If `path` is a folder that contains `own`, the files in `own` are left out.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    is_inside = path.resolve().is_relative_to(own)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return [
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if is_inside or not file.resolve().is_relative_to(own)
    ]
