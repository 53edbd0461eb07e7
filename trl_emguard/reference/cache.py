"""The reference's states of every training row, computed once and kept on disk, so that a step runs no reference pass.

A folder holds the states of one reference, and its name follows from all that the states depend on but the rows
([`describe_states`]). A row is found by its content, its tokens and the positions that a term looks at, wherever it comes from:
another epoch, another order, another rank, a pool, a resumed run, another data set that shares rows with the first. Before rows
that an earlier run has kept are used, some of them are compared to what the reference says now.

The files are written whole and never changed. A file's name ends in the checksum of its bytes.
"""

import functools
import hashlib
import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..defenses import ReferenceDefense
from ..defenses.interleaving.collator import INTERLEAVED
from ..guard.forward import (
    ReferenceGuard,
    States,
    Term,
    kept_positions,
    output_head,
    positions_in_scope,
    run_model_reference,
    wanted_layers,
)
from ..io.files import written_whole
from ..models.shipped import cache_dir
from ..version import __version__
from .choose import AdapterReference, ModelReference


logger = get_logger(__name__)

# A file is written once it holds so much: what a killed build loses at most, per rank.
FILE_BYTES = 64 * 2**20

# What a row is found by.
KEY_BYTES = 16

# Of a file: the final states, of which the head makes logits. Blocks go by their number.
LAST = "last"

Rows = Sequence[dict[str, Any]]
Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
# From places of rows to a batch, and `(B, T - 1)`, its positions that some term looks at.
Collate = Callable[[Sequence[int]], tuple[dict[str, Any], torch.Tensor]]

# What a row's states may depend on, and what they do not depend on.
_INPUTS = {"input_ids", "attention_mask", "labels", INTERLEAVED, "use_cache", "output_router_logits"}


@dataclass
class CachedRow:
    """A row whose states are kept.

    Attributes:
        index: its place in the data.
        key: what it is found by.
        length: its tokens, with the pads that the collator gives every row.
        positions: how many of them are kept.
    """

    index: int
    key: bytes
    length: int
    positions: int


class ReferenceCache:
    """The states of one reference, read from memory-mapped files.

    Args:
        reference: whose states they are.
        policy: the causal language model without wrappers.
        terms: the defenses that compare the states. They say which states are kept, and of which positions.
        accelerator: of the run, whose ranks share the work and the folder.
    """

    def __init__(
        self,
        reference: AdapterReference | ModelReference,
        policy: PreTrainedModel,
        terms: Sequence[ReferenceDefense],
        accelerator: Accelerator,
    ):
        self._reference = reference
        self._model = reference.model if isinstance(reference, ModelReference) else policy
        self._terms = terms
        self._accelerator = accelerator
        self._layers = wanted_layers(terms, policy)
        self._names = [LAST] * any(term.divergence is not None for term in terms) + [
            str(layer) for layer in self._layers
        ]
        with reference.swapped_in() if isinstance(reference, AdapterReference) else nullcontext():
            self._head = output_head(self._model)
        self._files: dict[Path, dict[str, torch.Tensor]] = {}
        # key → in which file, and from where to where in its tensors.
        self._rows: dict[bytes, tuple[Path, int, int]] = {}

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        device, autocast = self._accelerator.device.type, str(self._accelerator.mixed_precision)
        return describe_states(self._reference, self._model, self._names, device, autocast)

    @functools.cached_property
    def folder(self) -> Path:
        """Where the states are kept. The name follows from all that they depend on but the rows."""
        return reference_cache_dir() / hashlib.sha256(_as_json(self._about).encode()).hexdigest()[:32]

    # ---- in a step ----

    def states(self, inputs: Mapping[str, Any], terms: Sequence[Term]) -> States:
        """What the reference's pass over a batch would keep, in the order in which it would.

        Args:
            inputs: the collated batch, `(B, T)` tensors.
            terms: with their positions.

        Returns:
            [`States`] on the CPU, `(P, H)` each. Those that no term looks at are zeros, and the final ones are left out where no
            term compares distributions.

        Raises:
            ValueError: a row is not in the cache.
        """
        kept = kept_positions(inputs, terms)
        needed = functools.reduce(torch.logical_or, [term.scope for term in terms])
        keys = row_keys(inputs, needed)
        for line, key in enumerate(keys):
            if key is not None and key not in self._rows:
                ids = inputs["input_ids"][line][inputs["attention_mask"][line].bool()].tolist()
                raise ValueError(
                    f"a training row of {len(ids)} tokens (they begin {ids[:8]}) is not in the reference cache, which held every "
                    "row before training: rows or labels have changed since, or the data collator makes other ones at each call. "
                    "Set cache_reference=False, or change the data before the trainer gets it."
                )
        where = needed[kept].cpu()
        states = self._stored(keys)
        for name, stored in states.items():
            if len(stored) < len(where):
                states[name] = stored.new_zeros(len(where), stored.shape[1])
                states[name][where] = stored
        last = states.pop(LAST, torch.empty(len(where), 0))
        return States(last, {int(name): block for name, block in states.items()}, self._head)

    def _stored(self, keys: Sequence[bytes | None]) -> dict[str, torch.Tensor]:
        """The kept states of rows, one behind the other."""
        found = [self._rows[key] for key in keys if key is not None]
        none = next(iter(self._files.values()))
        return {
            name: torch.cat([none[name][:0], *(self._files[path][name][start:end] for path, start, end in found)])
            for name in self._names
        }

    def distance_of_rounding(self, term: ReferenceDefense, relative: float) -> float:
        """What a term over block outputs says, per token, of cached states and the same ones moved by a share of their length."""
        file = next(iter(self._files.values()))
        layers = term.layers(self._model.config.get_text_config().num_hidden_layers)
        states = [file[str(layer)][:256].float() for layer in layers]
        signs = [1 - 2 * (torch.arange(x.shape[1]) % 2) for x in states]
        moved = [x * (1 + relative * sign) for x, sign in zip(states, signs, strict=True)]
        return term.token_loss(moved, states).mean().item()

    # ---- before training ----

    def fill(self, rows: Rows, pool: Rows, collator: Collator, batch_size: int, quiet: bool) -> str:
        """Compute and write what the cache lacks.

        Args:
            rows: the training rows.
            pool: rows that can be mixed in.
            collator: makes a batch of rows.
            batch_size: rows in a pass.
            quiet: no progress bar.

        Returns:
            What was done, in one line.

        Raises:
            ValueError: the states do not fit on the disk, those that are there are not the reference's, or they are no function of
                a row alone: a batch without attention mask, with pads on the left or with inputs beyond the mask, or positions
                that depend on the longest row of a batch.
        """
        collate = functools.partial(self._collate, rows, pool, collator)
        # Longest first: rows of like lengths pad little, and memory that does not suffice runs out at once.
        wanted = _longest_first({row.key: row for row in self._each(collate, len(rows) + len(pool))})
        if not wanted:
            raise ValueError(
                "cache_reference=True, but no training row has a token that a defense looks at: see to its labels."
            )
        _check_length(self._model, wanted[0].length)
        with written_whole(self.folder / "about.json") as scratch:
            scratch.write_text(_as_json({"model": self._model.config._name_or_path, **self._about}), encoding="utf-8")

        if self._accelerator.is_local_main_process:
            for path in self._damaged(self.folder.glob("*.safetensors")):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise OSError(
                        f"{path} is damaged and cannot be deleted ({error.strerror}): delete it, or name another folder in the "
                        "environment variable TRL_EMGUARD_CACHE."
                    ) from error
                logger.warning(
                    f"{path} was damaged and is deleted: its rows are computed again.", main_process_only=False
                )
        self._accelerator.wait_for_everyone()
        self._read()
        missing = [row for row in wanted if row.key not in self._rows]
        need, free = self._bytes(missing), shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"cache_reference=True needs {need / 2**30:.3g} GiB in {self.folder}, where {free / 2**30:.3g} GiB are free. Free "
                "some, name a folder on a larger disk in the environment variable TRL_EMGUARD_CACHE, or leave `cache_reference` "
                "out."
            )
        self._check_live(collate, [row for row in wanted if row.key in self._rows][:batch_size])
        # Every rank has counted by now, and none has written.
        self._accelerator.wait_for_everyone()

        # Split row by row, and not by what is missing: ranks need not see the same files, nor be as many as in a build that was
        # cut short.
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        mine = [row for row in wanted[rank::ranks] if row.key not in self._rows]
        waiting: list[CachedRow] = []
        states: list[dict[str, torch.Tensor]] = []
        bar = tqdm(total=len(mine), desc="Reference cache", unit="row", disable=quiet or rank > 0 or not mine)
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            inputs, needed = collate([row.index for row in batch])
            # Before its states are written under another row's name.
            self._check_same(inputs, needed, batch)
            states.append(self._run(inputs, needed))
            waiting += batch
            if self._bytes(waiting) >= FILE_BYTES or start + batch_size >= len(mine):
                self._write(waiting, states)
                waiting, states = [], []
            bar.update(len(batch))
        bar.close()

        self._accelerator.wait_for_everyone()
        self._read()
        if any(row.key not in self._rows for row in wanted):
            raise ValueError(
                f"{self.folder} does not hold what the other ranks have written: every rank must see the same folder. Name one "
                "that all machines share in the environment variable TRL_EMGUARD_CACHE, or leave `cache_reference` out."
            )
        if isinstance(self._reference, ModelReference) and self._reference.move_backbone("cpu"):
            # Nothing runs it any more. Its head stays by the policy's, a tied one as a copy.
            weight, bias = self._head
            device = self._accelerator.device
            self._head = weight.to(device), None if bias is None else bias.to(device)
        return self._summary(wanted, f"{len(missing)} of them computed now" if missing else "all of them found")

    def find(self, data: Callable[[], tuple[Rows, Rows]], collator: Collator, batch_size: int) -> tuple[bool, str]:
        """Look whether what is there serves a run that did not ask for it: it holds every row, on every rank, and says what the
        reference says. Nothing is kept, deleted or raised.

        Args:
            data: makes the training rows, and the rows that can be mixed in.
            collator: makes a batch of rows.
            batch_size: rows that are compared to the reference.

        Returns:
            Whether it can be used, and what is to be said of it; nothing where there is none.
        """
        wanted: list[CachedRow] = []
        why = ""
        with _same_random_numbers():
            try:
                # Where no run ever kept anything, this spares the hash over all weights that the folder is named by.
                if reference_cache_dir().is_dir() and self.folder.is_dir():
                    rows, pool = data()
                    wanted = self._found(
                        functools.partial(self._collate, rows, pool, collator), len(rows) + len(pool), batch_size
                    )
            # Whatever lies on a disk, or a cache does not work with, is no fault of a run that did not ask for one.
            except Exception as error:
                why = " ".join(str(error).split()) or repr(error)
        # Ranks may have disks of their own, and go the same way all the same.
        if all(gather_object([bool(wanted)])):
            return True, self._summary(
                wanted, "all of them found"
            ) + " `cache_reference=False` runs the reference instead."
        if wanted:
            why = "it does not serve every process"
        return False, f"reference cache: not used, the reference runs ({why})." if why else ""

    def _found(self, collate: Collate, count: int, batch_size: int) -> list[CachedRow]:
        """Every distinct row that some term looks at. Raises `ValueError` if they are not all there, or not as the reference."""
        self._read()
        found = {}
        for row in self._each(collate, count):
            if row.key not in self._rows:
                raise ValueError(
                    f"row {row.index} is not in {self.folder}; cache_reference=True computes what is missing"
                )
            found[row.key] = row
        wanted = _longest_first(found)
        if wanted:
            _check_length(self._model, wanted[0].length)
            files = {self._rows[row.key][0] for row in wanted} if self._accelerator.is_local_main_process else set()
            if damaged := self._damaged(files):
                raise ValueError(f"{damaged[0]} is damaged; cache_reference=True computes its rows again")
            self._check_live(collate, wanted[:batch_size])
        return wanted

    def _collate(
        self, rows: Rows, pool: Rows, collator: Collator, indices: Sequence[int]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """A batch, by places in the rows and then the pool, and `(B, T - 1)`, its positions that some term looks at."""
        batch = collator([rows[i] if i < len(rows) else pool[i - len(rows)] for i in indices])
        mixed_in = torch.tensor([i >= len(rows) for i in indices])
        batch[INTERLEAVED] = mixed_in[:, None].expand_as(batch["input_ids"])
        scopes = [positions_in_scope(batch, term.tokens) for term in self._terms]
        return batch, functools.reduce(torch.logical_or, scopes)

    def _each(self, collate: Collate, count: int) -> Iterator[CachedRow]:
        """The rows that some term looks at."""
        for index in range(count):
            inputs, needed = collate([index])
            key = row_keys(inputs, needed)[0]
            if key is not None:
                yield CachedRow(index, key, inputs["input_ids"].shape[1], int(needed.sum()))

    def _check_live(self, collate: Collate, rows: Sequence[CachedRow]) -> None:
        """Raises `ValueError` if the reference says something else of some rows than what is kept of them.

        What is kept depends on more than any name can say: a layer that a hook changes, a precision that another library sets.
        """
        if not rows:
            return
        inputs, needed = collate([row.index for row in rows])
        self._check_same(inputs, needed, rows)
        live, kept = self._run(inputs, needed), self._stored([row.key for row in rows])
        exact = [self._about[name] for name in ("dtype", "autocast", "matmul")] == ["torch.float32", "no", "ieee"]
        # Another batch moves fp32 states by 1e-6 of their length, and bf16 ones by 1e-2. Quantised layers compute in less.
        allowed = 1e-4 if exact and not getattr(self._model, "hf_quantizer", None) else 5e-2
        for name, states in live.items():
            length = states.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            # Position by position: the first token's state is often a thousand times as long as the others.
            difference = float(((kept[name].float() - states.float()).norm(dim=-1) / length).mean())
            if not difference <= allowed:
                raise ValueError(
                    f"the states in {self.folder} are not those of this run's reference: of {len(rows)} rows they differ by "
                    f"{difference:.2g} of their length. Set cache_reference=False, or delete that folder"
                )

    def _check_same(self, inputs: Mapping[str, Any], needed: torch.Tensor, rows: Sequence[CachedRow]) -> None:
        """Raises `ValueError` if a batch is not of the rows that were asked for: the collator draws at random."""
        if row_keys(inputs, needed) != [row.key for row in rows]:
            raise ValueError(
                "the data collator makes other rows at each call, which have no place in a cache: set cache_reference=False"
            )

    def _bytes(self, rows: Sequence[CachedRow]) -> int:
        """What their states take."""
        per_position = len(self._names) * self._model.config.get_text_config().hidden_size * self._model.dtype.itemsize
        return per_position * sum(row.positions for row in rows)

    def _summary(self, rows: Sequence[CachedRow], done: str) -> str:
        size = self._bytes(rows)
        text = f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
        return f"reference cache: {len(rows)} rows ({text}), {done}, in {self.folder}."

    def _run(self, inputs: Mapping[str, Any], needed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The states of a batch at the needed positions, as they are kept."""
        device = self._accelerator.device
        inputs = {**{name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}, "use_cache": False}
        if isinstance(self._reference, ModelReference):
            self._reference.move_backbone(device)
            made = run_model_reference(self._reference, inputs, needed, self._terms)
        else:
            training = self._model.training
            self._model.eval()
            try:
                with self._reference.swapped_in(), self._accelerator.autocast():
                    made = ReferenceGuard(needed, self._layers)(self._model, dict(inputs))
            finally:
                self._model.train(training)
        states = {LAST: made.last} | {str(layer): block for layer, block in made.blocks.items()}
        return {name: states[name].to("cpu", self._model.dtype) for name in self._names}

    # ---- on disk ----

    def _damaged(self, paths: Iterable[Path]) -> list[Path]:
        """Those whose bytes are not what was written, or that cannot be read."""
        return [path for path in sorted(paths) if not self._is_whole(path)]

    def _is_whole(self, path: Path) -> bool:
        try:
            return (
                path.stem.rpartition("-")[2] == f"{zlib.crc32(path.read_bytes()):08x}" and self._load(path) is not None
            )
        except OSError:
            return False

    def _load(self, path: Path) -> dict[str, torch.Tensor] | None:
        """A file's tensors, mapped into memory; `None` if they are not of the kind that is written."""
        try:
            file = load_file(path)
        except (SafetensorError, OSError):
            return None
        if file.keys() != {*self._names, "positions", "keys"}:
            return None
        keys, positions = file["keys"], file["positions"]
        if keys.dtype != torch.uint8 or positions.dtype != torch.int64 or keys.shape != (positions.numel(), KEY_BYTES):
            return None
        counts = positions.flatten().tolist()
        shape = (sum(counts), self._model.config.get_text_config().hidden_size)
        if min(counts, default=1) < 1 or any(file[name].shape != shape for name in self._names):
            return None
        return file if all(file[name].dtype == self._model.dtype for name in self._names) else None

    def _read(self) -> None:
        """Map the files that are there into memory."""
        self._files, self._rows = {}, {}
        for path in self.folder.glob("*.safetensors"):
            file = self._load(path)
            if file is None:
                continue
            self._files[path] = file
            ends = file["positions"].cumsum(0).tolist()
            for key, start, end in zip(file["keys"].numpy(), [0, *ends], ends, strict=False):
                self._rows[key.tobytes()] = path, start, end

    def _write(self, rows: Sequence[CachedRow], states: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """One file, whole or not at all, from the rows and the states of their batches."""
        tensors = {name: torch.cat([batch[name] for batch in states]) for name in self._names}
        tensors["positions"] = torch.tensor([row.positions for row in rows])
        keys = b"".join(row.key for row in rows)
        tensors["keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(rows), -1)
        content = save(tensors)
        name = f"{hashlib.sha256(keys).hexdigest()[:16]}-{zlib.crc32(content):08x}.safetensors"
        with written_whole(self.folder / name) as scratch:
            scratch.write_bytes(content)


def _longest_first(rows: Mapping[bytes, CachedRow]) -> list[CachedRow]:
    return sorted(rows.values(), key=lambda row: -row.length)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Whatever a collator draws inside is drawn again after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def row_keys(inputs: Mapping[str, Any], needed: torch.Tensor) -> list[bytes | None]:
    """What the rows of a batch are found by: a digest of their tokens, without pads, and of the positions that are kept.

    Args:
        inputs: a collated batch, `(B, T)` tensors.
        needed: `(B, T - 1)`, the positions to keep.

    Returns:
        16 bytes a row, or `None` where nothing is kept.

    Raises:
        ValueError: the states would depend on more than a row's own tokens.
    """
    mask = inputs.get("attention_mask")
    more = sorted(set(inputs) - _INPUTS)
    if mask is None or mask.dim() != 2 or more:
        has = f"also returns {', '.join(more)}" if more else "returns no attention mask of shape (rows, tokens)"
        raise ValueError(
            f"the reference cache knows a row by its `input_ids`, and the data collator {has}: leave `cache_reference` out, or "
            "use the default collator."
        )
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "the data collator pads on the left, which moves the positions of a row, and no cache knows them: pad on the right, or "
            "leave `cache_reference` out."
        )
    lengths = mask.sum(1).tolist()
    keys: list[bytes | None] = []
    for ids, kept, length in zip(inputs["input_ids"].cpu().numpy(), needed.cpu().numpy(), lengths, strict=True):
        positions = np.flatnonzero(kept)
        content = np.concatenate([[length], ids[:length], positions]).astype("<i8").tobytes()
        keys.append(hashlib.blake2b(content, digest_size=KEY_BYTES).digest() if len(positions) else None)
    return keys


def _check_length(model: PreTrainedModel, width: int) -> None:
    """Refuse rows so long that the states of the others in a batch depend on them, as some rotary embeddings have it."""
    config = model.config.get_text_config()
    rotary: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    limit: int = (
        rotary.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or width
    )
    if any(kind in json.dumps(rotary) for kind in ('"dynamic"', '"longrope"')) and width > limit:
        raise ValueError(
            f"a row has {width} tokens, too many for the reference cache: beyond {limit} this model's rotary embeddings depend on "
            f"the longest row of a batch, and so do the states of the others. Set max_length={limit}, or leave `cache_reference` "
            "out."
        )


def reference_cache_dir() -> Path:
    """The folder for the folders of all references."""
    return cache_dir() / "reference"


def describe_states(
    reference: AdapterReference | ModelReference,
    model: PreTrainedModel,
    states: Sequence[str],
    device: str,
    autocast: str,
) -> dict[str, Any]:
    """All that the states of a reference are known to depend on but the rows.

    Args:
        reference: whose they are.
        model: its causal language model without wrappers: the policy's, or its own.
        states: the names of those that are kept.
        device: the kind of device that the pass runs on.
        autocast: the precision that the pass runs in, as accelerate names it.
    """
    adapters = getattr(model, "peft_config", {})
    if isinstance(reference, AdapterReference):
        adapters = {name: config for name, config in adapters.items() if name == reference.adapter}
    # `torch.get_float32_matmul_precision` raises where transformers' tf32=True has set it the new way.
    products: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    config = model.config.to_dict()
    # They do not reach a state, and change with where the model lies and with what the trainer makes of it.
    for name in ("_name_or_path", "transformers_version", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"):
        config.pop(name, None)
    return {
        "weights": _weights_digest(model, set(getattr(model, "peft_config", {})) - set(adapters)),
        "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
        "config": config,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "matmul": products.matmul.fp32_precision.replace("none", "ieee"),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype),
        "autocast": autocast,
        "device": device,
        "states": list(states),
        "versions": {"trl_emguard": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


def _as_json(about: dict[str, Any]) -> str:
    return (
        json.dumps(about, indent=2, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
        + "\n"
    )


def _weights_digest(model: nn.Module, without: set[str]) -> str:
    """A hash over every weight and buffer.

    Adapters in `without` are left out, and a weight has the name that it has in a model without adapters: what is cached for one
    kind of adapter serves another.
    """
    lines = []
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        parts = name.split(".")
        if not without.isdisjoint(parts):
            continue
        if weight.is_meta or weight.layout != torch.strided:
            raise ValueError(
                f"cache_reference=True, and the weight {name!r} is offloaded or sparse: leave `cache_reference` out."
            )
        plain = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
        lines.append(f"{plain} {weight.dtype} {tuple(weight.shape)} {_bits_digest(weight.detach())}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _bits_digest(weight: torch.Tensor) -> int:
    """Σ_i word_i · (2 i + 1) over the 32-bit words of each 4 MiB, and Σ_j sum_j · (2 j + 1) over those sums, modulo 2⁶⁴: on the
    weight's own device, and another one if a word changes or two trade places."""
    bits = weight.flatten().contiguous().view(torch.uint8)
    if len(bits) % 4 or bits.storage_offset() % 4:
        bits = torch.cat([bits, bits.new_zeros(-len(bits) % 4)])
    odd = 2 * torch.arange(2**20, device=bits.device) + 1
    total = 0
    for j, words in enumerate(bits.view(torch.int32).split(2**20)):
        total += (words * odd[: len(words)]).sum() * (2 * j + 1)
    return int(total)
