"""Inputs of a run of `trl-emguard sft`, its model and rows, checked before weights are loaded."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetGenerationError
from transformers import AutoConfig, AutoProcessor, Trainer
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset

from ..checks import check_output_dir
from ..config import EMGuardConfig
from ..data.files import FORMATS, file_format
from ..data.load import SourceOptions, check_apart, load_rows
from ..data.training import (
    ProcessingClass,
    as_messages,
    check_format,
    check_template,
    fill_template_kwargs,
    read_template,
)
from ..models.chat import text_part
from ..models.load import text_tokenizer
from ..models.shipped import resolve_model


def check_packages(training_args: EMGuardConfig, model_args: ModelConfig) -> None:
    """Check that the packages of the optimizer and of a quantised base model are installed.

    Raises:
        ValueError: a package is missing or too old.
    """
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name) and not is_bitsandbytes_available():
            raise ValueError(f"{name}=True needs bitsandbytes: `pip install -U bitsandbytes`.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(training_args)
    except ImportError as error:
        raise ValueError(f"optim={OptimizerNames(training_args.optim).value}: {error}.") from error
    except ValueError:
        pass  # Some optimizers need the model for this, which is not loaded yet.


def check_model(training_args: EMGuardConfig, name: str | None) -> None:
    """Check that the model exists.

    Raises:
        ValueError: no model is named, or its code is not trusted.
        FileNotFoundError: the name is not that of a shipped model, a folder or a model on the hub.
        OSError: a shipped model cannot be written into the cache folder.
    """
    if not name:
        raise ValueError("model_name_or_path is missing: name a model folder, a hub id or a shipped model.")
    path = resolve_model(name)
    try:
        AutoConfig.from_pretrained(path, **_hub_options(training_args))
    except (OSError, ValueError) as error:  # a folder without a model's config raises ValueError
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model_name_or_path={name!r} has code of its own: --trust_remote_code true runs it."
            ) from error
        cause = str(error).strip().splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"model_name_or_path={name!r} is not a shipped model, and cannot be read from a folder or the hub "
            f"({cause}). Check the name, the network, and for a gated model `hf auth login`."
        ) from error


def load_processing_class(training_args: EMGuardConfig, name: str, rows: Any) -> ProcessingClass:
    """Load the tokenizer or processor that a run on `rows` will use, with the run's chat template.

    Raises:
        ValueError: there is none, it is empty, or the chat template cannot be read.
    """
    fix = "Save the tokenizer there too: tokenizer.save_pretrained(FOLDER)."
    path = resolve_model(name)
    try:
        found = text_tokenizer(path, training_args, rows)
        if found is None:  # SFTTrainer then loads it itself, like this
            found = AutoProcessor.from_pretrained(path, **_hub_options(training_args))
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"model_name_or_path={name!r} has no tokenizer that loads ({cause}). {fix}") from error
    # For some architectures, transformers makes a tokenizer of special tokens alone if the folder has none.
    tokenizer = text_part(found)
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(f"model_name_or_path={name!r} has no tokenizer, or an empty one. {fix}")
    if training_args.chat_template_path is not None:
        found.chat_template = read_template(training_args.chat_template_path)
    return found


def _hub_options(training_args: EMGuardConfig) -> dict[str, Any]:
    revision = (training_args.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
    return {"revision": revision, "trust_remote_code": training_args.trust_remote_code}


def read_data(
    script_args: ScriptArguments,
    training_args: EMGuardConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> tuple[Any, Any]:
    """Return the training rows, and the evaluation rows or `None` if `eval_strategy` is "no".

    Rows of `conversations` become rows of `messages`. The revision, attention implementation and dtype of `model_args`
    are put into `training_args.model_init_kwargs`, unless they are set there already.

    Raises:
        ValueError, FileNotFoundError: a bad argument.
    """
    # `trl sft` passes these values as well. Values that the user put into `model_init_kwargs` win.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    check_packages(training_args, model_args)
    check_model(training_args, model_args.model_name_or_path)
    check_output_dir(training_args, bool(model_args.use_peft))
    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError("give either `dataset_name` or `datasets` (a list, in the YAML file): one of the two.")
    _check_source(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no"
    if evaluates:
        check_apart(script_args.dataset_train_split, script_args.dataset_test_split)
    if dataset_args.datasets:
        splits = _read_mixture(dataset_args)
        for split in [script_args.dataset_train_split] + [script_args.dataset_test_split] * evaluates:
            if split not in splits:
                raise ValueError(
                    f"the mixture in `datasets` has no split {split!r}: it has {', '.join(map(repr, splits))}. "
                    "`test_split_size` splits a 'test' off."
                )
        train_dataset = splits[script_args.dataset_train_split]
        eval_dataset = splits[script_args.dataset_test_split] if evaluates else None
    else:
        name, config, streaming = script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming
        train_dataset = load_rows(name, script_args.dataset_train_split, config, streaming)
        options = SourceOptions(split="dataset_test_split")
        test_split = script_args.dataset_test_split
        eval_dataset = load_rows(name, test_split, config, streaming, options) if evaluates else None

    train_dataset, eval_dataset = fill_template_kwargs(train_dataset), fill_template_kwargs(eval_dataset)
    source = "datasets" if dataset_args.datasets else f"dataset_name={script_args.dataset_name!r}"
    processing_class = load_processing_class(training_args, str(model_args.model_name_or_path), train_dataset)
    _check_batches(training_args, processing_class, train_dataset)
    converted = []
    for rows in (train_dataset, eval_dataset):
        check_format(rows, training_args, source)
        converted.append(as_messages(rows, processing_class, source))
        check_template(converted[-1], training_args, processing_class, source)
    if converted[0] is not train_dataset and training_args.process_index == 0:
        print(f"trl_emguard: `conversations` of {source} become `messages`, with the roles `user` and `assistant`.")
    return converted[0], converted[1]


def _check_batches(training_args: EMGuardConfig, processing_class: ProcessingClass, rows: Any) -> None:
    """Refuse options of padding and special tokens that SFTTrainer would refuse once the weights are loaded.

    Raises:
        ValueError: the tokenizer lacks `eos_token` or `pad_token`, or `padding_free` would ignore `max_length`.
    """
    vocabulary = text_part(processing_class).get_vocab()
    for name in ("eos_token", "pad_token"):
        token = getattr(training_args, name)
        # SFTTrainer reads `pad_token` once it has taken over a chat template, which may bring tokens along.
        is_later = name == "pad_token" and training_args.chat_template_path is not None
        if token is not None and token not in vocabulary and not is_later:
            raise ValueError(
                f"{name}={token!r} is not in the vocabulary of the model's tokenizer: name a token that is, or leave "
                "it out."
            )
    first: dict[str, Any] = next(iter(rows), {})
    has_images = first.keys() & {"image", "images"}
    is_cut = training_args.max_length is not None and not has_images
    if training_args.padding_free and not training_args.packing and is_cut:
        raise ValueError(
            f"padding_free=True without packing does not enforce max_length={training_args.max_length}: set "
            "packing=True, or max_length=None for rows that are short enough."
        )


def _check_source(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> None:
    """Refuse options that belong to the option `datasets` if `dataset_name` gives the rows, and the other way round.

    Raises:
        ValueError: an option of `datasets` is set beside `dataset_name`, or the other way round.
    """
    given: ScriptArguments | DatasetMixtureConfig
    if dataset_args.datasets:
        given, used = script_args, "datasets"
        others = {
            "dataset_streaming": "set `streaming` instead",
            "dataset_config": "set `name` in an entry of `datasets` instead",
        }
    else:
        given, used = dataset_args, "dataset_name"
        others = {
            "streaming": "set `dataset_streaming` instead",
            "test_split_size": "it needs `datasets`; beside `dataset_name`, name rows by `dataset_test_split` instead",
        }
    for name, advice in others.items():
        value = getattr(given, name)
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r} has no effect with `{used}`: {advice}.")


def _read_mixture(dataset_args: DatasetMixtureConfig) -> Mapping[str, Any]:
    """Return the rows of `datasets` by split: "train", and with `test_split_size` also "test".

    TRL would split without a seed. Each rank and each resumed run would then train on other rows. The seed here is
    constant, not the run's, so that runs with different seeds train on the same rows.

    Raises:
        ValueError: a stream is to be split, or an entry cannot be loaded.
    """
    for entry in dataset_args.datasets:
        suffix = file_format(Path(entry.path))
        if suffix is not None:
            raise ValueError(
                f"datasets: `path: {entry.path}` is a file. Give it as `path: {FORMATS[suffix]}` and `data_files: "
                f"{entry.path}`."
            )
    size = dataset_args.test_split_size
    if size is not None and dataset_args.streaming:
        raise ValueError(f"test_split_size={size} cannot split a stream: leave out `streaming` or `test_split_size`.")
    try:
        splits = get_dataset(dataclasses.replace(dataset_args, test_split_size=None))
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(
            f"datasets cannot be loaded: {cause}. An entry names a data set of the hub by `path`, or a file by `path: "
            "json` and `data_files`."
        ) from error
    return splits if size is None else splits["train"].train_test_split(test_size=size, seed=0)
