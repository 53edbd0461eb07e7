"""Facts that identify a run, compared when it resumes from a checkpoint; and the model card's section on defenses."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from .data.files import opens_files
from .defenses import Defense
from .io.files import written_whole
from .io.strict import parse_json
from .models.adapters import bare_model
from .models.identity import fingerprint


# Columns of tokenised rows that identify the rows: first the columns of SFT, then those of DPO (pairs of answers) and
# KTO (answers with a label). Other columns may depend on the batch size, which may change. Rows without any of the
# `..._ids` columns in this list have not been tokenised by a trainer. They are identified by all of their columns
# except images and sounds.
TOKENISED = (
    ("input_ids", "labels", "seq_lengths"),
    ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label"),
)


def run_identity(model: PreTrainedModel, rows: Any, seed: int) -> dict[str, Any]:
    """Return the facts that identify a run, and that must be the same when the run resumes.

    Learning rate, steps, batch size, logging and saving may change, so they are not among these facts.

    Args:
        model: the policy. With adapters, the weights of the base model identify it. Without adapters, only its
            architecture and sizes do (such as the number of layers): a run that resumes full fine-tuning may start
            from any weights, because the checkpoint replaces them.
        rows: training rows, tokenised if the trainer does so. All streams count as equal.
        seed: seed of the order of the rows.
    """
    adapters = getattr(model, "peft_config", None)
    config = bare_model(model).config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")]
    weights = None if adapters is None else fingerprint(model, set(adapters), is_plain=True)
    return {"model": weights or "-".join(map(str, sizes)), "rows": _rows_checksum(rows), "seed": seed}


def _rows_checksum(rows: Any) -> str:
    if not isinstance(rows, Dataset):
        return "streamed"
    found = ([name for name in names if name in rows.column_names] for names in TOKENISED)
    # Images and sounds are left out: reading them takes long, and their paths may change from machine to machine.
    untokenised = [name for name, feature in rows.features.items() if not opens_files(feature)]
    columns = next((names for names in found if any(name.endswith("_ids") for name in names)), untokenised)
    if not columns:
        return f"{len(rows)} rows"
    checksum = 0
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        for name in columns:
            for content in _bytes(batch.column(name).combine_chunks()):
                checksum = zlib.crc32(content, checksum)
    return f"{len(rows)} rows ({checksum:08x})"


def _bytes(column: pyarrow.Array) -> Iterator[bytes]:
    """Yield a column as bytes: list lengths and items if it holds lists of integers, otherwise its values as text."""
    is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
    if is_list and pyarrow.types.is_integer(column.type.value_type):
        for numbers in (column.value_lengths(), column.flatten()):
            yield np.asarray(numbers).astype("<i8").tobytes()
    else:
        yield repr(column.to_pylist()).encode()


def step_of_weights(args: TrainingArguments, state: TrainerState, is_over: bool, chosen: int | None = None) -> int:
    """Return the step of the trainer's weights: the last one, or that of the best model if it is loaded at the end.

    Args:
        is_over: True once training has ended. Trainer then has loaded the best model, if `load_best_model_at_end`.
        chosen: step whose weights a callback has put back at the end of training; `None` if none has.
    """
    if chosen is not None:
        return chosen
    has_best = is_over and args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if has_best else state.global_step


def why_other(
    record: dict[str, Any] | None,
    current: dict[str, Any],
    defenses: Sequence[Defense],
    compare_weights: bool = True,
    is_on_all_ranks: bool = False,
) -> str | None:
    """Return why a checkpoint belongs to another run; `None` if it belongs to this run.

    The text continues a message that begins with the checkpoint's name.

    Args:
        record: content of the checkpoint's `defense.json`; `None` if it has none (a checkpoint of another trainer).
        current: content of the `defense.json` that this run would write.
        defenses: active defenses of this run.
        compare_weights: whether weights are compared. A dry run has no weights.
        is_on_all_ranks: whether every rank calls this function.
    """
    then = {} if record is None else record["defenses"]
    now = dict(current["defenses"])
    now |= {
        d.name: as_read(d, "options_like", d.options_like(then[d.name], is_on_all_ranks))
        for d in defenses
        if d.name in then
    }
    if then != now:
        return (
            f"was trained with {_defenses_text(then)}, and this run has {_defenses_text(now)}. Resume with the same "
            "defense and options, or start a new run from that model."
        )
    if record is None:
        return None
    before, after = (_compared(r.get("reference"), compare_weights) for r in (record, current))
    if before != after:
        return (
            f"was held to another reference ({(record.get('reference') or {}).get('kind')}) than this run is "
            f"({(current['reference'] or {}).get('kind')}). Resume with the model that training started from, not "
            "with the checkpoint's: `resume_from_checkpoint` loads what was learned."
        )
    names = ("model", "rows", "seed") if compare_weights else ("rows", "seed")
    # Checkpoints of earlier versions of this package have no entry `run`. They are taken for checkpoints of this run.
    run = record.get("run") or current["run"]
    other = [
        f"{name} {run.get(name)}, and not {current['run'][name]}"
        for name in names
        if run.get(name) != current["run"][name]
    ]
    if other:
        return (
            f"is of another run (it has {'; '.join(other)}). Resume with the same rows, model and seed, or start "
            "anew. If only the checksum of the rows differs, the chat template may write today's date: set it in the "
            "rows' `chat_template_kwargs`, such as `date_string`."
        )
    return None


def as_read(defense: Defense, hook: str, value: Any) -> Any:
    """Return a value as it will be read from `defense.json`: with lists in place of tuples, for example.

    Args:
        defense: defense that made the value.
        hook: its method that returned the value, for messages.
        value: value to be written.

    Raises:
        ValueError: JSON cannot hold the value.
    """
    try:
        return parse_json(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"defense {defense.name!r}: {hook}() returned {value!r}, and a checkpoint cannot record it ({error}). "
            "Return numbers, text, booleans, None, and lists and dicts of them."
        ) from error


def add_to_card(
    folder: str, defenses: Sequence[Defense], verdict: str | None, reference: dict[str, Any] | None
) -> None:
    """Add a section on the defense to the model card in a folder."""
    card = Path(folder) / "README.md"
    before, heading, after = card.read_text(encoding="utf-8").partition("### Framework versions")
    section = "\n".join(_card_section(defenses, verdict, reference))
    with written_whole(card) as scratch:
        scratch.write_text(before + section + "\n\n" + heading + after, encoding="utf-8")


def _card_section(defenses: Sequence[Defense], verdict: str | None, reference: dict[str, Any] | None) -> list[str]:
    section = ["## Defense against emergent misalignment", ""]
    if verdict is not None:
        section += [f"**This model was not defended.** {verdict}", ""]
    if not defenses:
        return [*section, "None."]
    section += ["Trained with trl_emguard, in-training defense:", ""]
    for defense in defenses:
        papers = "; ".join(f"[{p.title}](https://arxiv.org/abs/{p.id})" for p in defense.papers)
        options = ", ".join(f"`{name}={value}`" for name, value in defense.options().items())
        section.append(f"- `{defense.name}`: {options}" + (f" ({papers})" if papers else ""))
    if reference is not None:
        section.append(f"- reference: {reference['kind']}")
    return section


def _compared(reference: dict[str, Any] | None, compare_weights: bool) -> tuple[str, str] | None:
    """Return the facts about a reference model that must not change on a resume: its kind and a hash of its weights.

    The kind is returned without the path that the reference was loaded from and without the ending ", cached", because
    these may change. The hash (fingerprint) is an empty text without `compare_weights`.
    """
    if reference is None:
        return None
    kind = reference["kind"].removesuffix(", cached").partition(" from ")[0]
    return kind, reference["fingerprint"] if compare_weights else ""


def _defenses_text(defenses: dict[str, dict[str, Any]]) -> str:
    if not defenses:
        return "no defense"
    return "; ".join(f"{name} ({', '.join(f'`{n}={v}`' for n, v in o.items())})" for name, o in defenses.items())
