"""Resuming of an interrupted scoring run from its journals: JSONL files of scores in the folder `<output>.parts`.

Each process of a run writes the scores of its rows to a journal of its own. A key, a checksum of everything that the
scores depend on, tells if a journal belongs to the same run.
"""

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np
from peft import PeftModel, get_peft_model_state_dict

from ..io.journal import Journal
from ..models.chat import EncodedAnswer
from ..models.identity import weight_checksums, weights_fingerprint
from ..version import __version__
from .scored import ALIGNED, misaligned_column, read_scores


def scores_key(model: PeftModel, adapters: Sequence[str], encoded: Mapping[int, EncodedAnswer]) -> str:
    """Return a checksum of everything that the rows' likelihoods depend on, such as weights and tokens."""
    base = model.get_base_model()
    configs = [base.config.to_dict()] + [model.peft_config[name].to_dict() for name in adapters]
    for config in configs:
        # These entries say where a model came from and which library versions saved it. Likelihoods do not depend on
        # them, so they must not change the checksum.
        for place in ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "revision"):
            config.pop(place, None)
    about = [weight_checksums(base), list(adapters), str(model.dtype), configs, __version__]
    digest = hashlib.sha256(
        json.dumps(
            about, sort_keys=True, default=lambda x: sorted(map(str, x)) if isinstance(x, set) else str(x)
        ).encode()
    )
    for name in adapters:
        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        digest.update(weights_fingerprint(weights).encode())
    for index, row in encoded.items():
        digest.update(np.array([index, row.prompt_length]).tobytes() + row.ids.tobytes())
    return digest.hexdigest()


def parts_folder(output: Path) -> Path:
    """Return the folder that keeps the scores until the output is written."""
    return output.with_name(f"{output.name}.parts")


def _part(path: Path, key: str) -> Journal:
    return Journal(path, {"scores_of": key})


def new_part(output: Path, key: str, rank: int) -> Journal:
    """Start a new journal for this process. Journals of earlier runs are never written to."""
    folder = parts_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob(f"*-{rank}.jsonl")))
    journal = _part(folder / f"{number}-{rank}.jsonl", key)
    journal.path.touch(exist_ok=False)
    journal.start()
    return journal


def resume_scores(output: Path, key: str, rows: Container[int], width: int) -> dict[int, list[float]]:
    """Return row → its negative log-likelihoods (NLLs), from a finished output or an interrupted run's journals.

    A row has `width` NLLs: under the aligned model, and under each misaligned adapter.

    Raises:
        ValueError: the files belong to another run or are corrupt.
    """
    if output.exists():
        return _scores_of_file(output, key, width)
    nll: dict[int, list[float]] = {}
    for path in sorted(parts_folder(output).glob("*.jsonl")):
        try:
            for record in _part(path, key).read():
                index, values = record
                if type(index) is not int or index not in rows or [type(value) for value in values] != [float] * width:
                    raise ValueError(f"{str(record)[:80]} is no row of the pool with {width} scores")
                nll[index] = values
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} does not belong to this run ({error}): delete the folder {path.parent}, or name another "
                "output."
            ) from error
    return nll


def _scores_of_file(output: Path, key: str, width: int) -> dict[int, list[float]]:
    """Return row → its `width` negative log-likelihoods from a finished output. Refuse the output of another run."""
    scored, info = read_scores(output)
    if info.key != key or len(info.adapters) != width - 1:
        raise ValueError(
            f"{output} holds the scores of another model, pool or settings: name another output, or delete it."
        )
    columns = [ALIGNED, *map(misaligned_column, range(width - 1))]
    values = zip(*(scored[column] for column in columns), strict=True)
    left_out = {index for index, _ in info.unscored}
    return dict(zip((i for i in range(info.rows) if i not in left_out), map(list, values), strict=True))
