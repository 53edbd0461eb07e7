"""Cache of the reference model's hidden states, which are computed once for every training row and kept on disk.

Training steps then read the states instead of running the reference. A folder holds the states of one reference. The
folder's name is a hash of everything that the states are known to depend on except the rows ([`describe_states`]). A
row is looked up by its content. So its states can also be read in another epoch or order, on another rank, in a
resumed run, or for another data set that contains the same row.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from ..guard.forward import States
from ..io.files import written_whole
from ..models.identity import fingerprint
from ..models.shipped import cache_dir
from ..version import __version__
from .cached_rows import CachedRow, check_length, row_keys
from .state_files import StateFiles


# A rank writes a file as soon as the states that it has computed, but not yet written, take this many bytes. So an
# interruption costs each rank at most about this many bytes of states.
FILE_BYTES = 64 * 2**20

# Key, in the cache's files, of the states after the final norm, which the output head turns into logits. The key of a
# block's output is the block's number as text.
LAST = "last"

# Function from indices of rows (training rows, and rows that defenses add) to their collated batch and a mask,
# `(B, T - 1)`, of the positions at which some defense compares policy and reference.
Collate = Callable[[Sequence[int]], tuple[dict[str, Any], torch.Tensor]]
# Function from keyword arguments of the backbone (the model without its output head) and a mask of positions,
# `(B, T - 1)`, to the reference's states at these positions.
RunReference = Callable[[dict[str, Any], torch.Tensor], States]


class ReferenceCache:
    """Store of one reference's hidden states, which are computed before training and read in the training steps.

    Args:
        model: causal language model without wrappers that the reference runs on: the policy, or a separate model.
        run: function that runs the reference.
        head: the reference's output head: weight `(V, H)`, and bias `(V,)` or `None`. The head is not kept on disk.
        layers: blocks whose outputs are kept, counted from 1.
        keeps_last: whether the states after the final norm are kept. A defense that compares next-token distributions
            needs them.
        accelerator: accelerator of the run, whose ranks share the work and the folder.
        without: names of the model's adapters that do not act in the reference's pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run: RunReference,
        head: tuple[torch.Tensor, torch.Tensor | None],
        layers: Sequence[int],
        keeps_last: bool,
        accelerator: Accelerator,
        without: Collection[str] = (),
    ):
        self.head = head
        self._model = model
        self._run = run
        self._accelerator = accelerator
        names = [LAST] * keeps_last + [str(layer) for layer in layers]
        self._about = describe_states(model, names, accelerator.device.type, str(accelerator.mixed_precision), without)
        self.folder = reference_cache_dir() / hashlib.sha256(_as_json(self._about).encode()).hexdigest()[:32]
        self._files = StateFiles(self.folder, names, model.config.get_text_config().hidden_size, model.dtype)

    # ---- in a training step ----

    def states(self, inputs: Mapping[str, Any], compared: torch.Tensor) -> States:
        """Return a batch's states from the files, in the order in which a pass of the reference would give them.

        Args:
            inputs: collated batch of `(B, T)` tensors.
            compared: `(B, T - 1)`, mask of the positions that some defense compares, P of them.

        Returns:
            [`States`] on the CPU, `(P, H)` each. The states after the final norm are `(P, 0)` if no defense compares
            distributions.

        Raises:
            ValueError: a row is not in the cache.
        """
        keys = row_keys(inputs, compared)
        for line, key in enumerate(keys):
            if key is not None and key not in self._files.keys:
                ids = inputs["input_ids"][line][inputs["attention_mask"][line].bool()].tolist()
                raise ValueError(
                    f"a training row of {len(ids)} tokens (they begin {ids[:8]}) is not in the reference cache, which "
                    "held every row before training: rows or labels have changed since, or the data collator makes "
                    "other ones at each call. Set cache_reference=False, or change the data before the trainer gets "
                    "it."
                )
        states = self._files.states([key for key in keys if key is not None])
        last = states.pop(LAST, torch.empty(int(compared.sum()), 0))
        return States(last, {int(name): block for name, block in states.items()}, self.head)

    def distance_of_rounding(
        self, token_loss: Callable[..., torch.Tensor], layers: Sequence[int], relative: float
    ) -> float:
        """Return the mean distance that a defense finds between cached states and copies of them with rounding errors.

        The distance is measured on a sample of the cached states. The rounding errors are imitated by an error of size
        `relative`.

        Args:
            token_loss: function from two lists of states to the distance of each token.
            layers: blocks whose outputs the defense compares.
            relative: size of the error, relative to each number. Its sign alternates along a state.
        """
        kept = self._files.sample(256)
        states = [kept[str(layer)].float() for layer in layers]
        signs = [1 - 2 * (torch.arange(x.shape[1]) % 2) for x in states]
        moved = [x * (1 + relative * sign) for x, sign in zip(states, signs, strict=True)]
        return token_loss(moved, states).mean().item()

    # ---- before training ----

    def fill(self, collate: Collate, count: int, batch_size: int, is_quiet: bool) -> str:
        """Compute and write the states that the cache lacks.

        Args:
            collate: function that makes a batch of the rows with given indices, and marks the positions whose states
                are kept.
            count: number of rows in the data.
            batch_size: number of rows in one pass of the reference.
            is_quiet: whether to hide the progress bar.

        Returns:
            A line for the log: number and size of the cached rows, how many were computed now, and the folder.

        Raises:
            ValueError: no row has a position to compare; the states do not fit on the disk; the states on the disk
                are not the reference's; ranks see different folders; the collator makes other rows at each call; or a
                row's states depend on more than the row (other inputs, pads on the left, the longest row of a batch).
            OSError: a file cannot be written, or a damaged one cannot be deleted.
        """
        rows = self._find_rows(collate, count)
        with written_whole(self.folder / "about.json") as scratch:
            about = {"model": self._model.config._name_or_path, **self._about}
            scratch.write_text(_as_json(about), encoding="utf-8")
        if self._accelerator.is_local_main_process:
            self._files.delete_damaged()
        self._accelerator.wait_for_everyone()
        self._files.read()
        missing = [row for row in rows if row.key not in self._files.keys]
        self._check_disk(missing)
        self._check_live(collate, [row for row in rows if row.key in self._files.keys][:batch_size])
        # No rank may write before every rank has found its `missing` rows. A rank that looked for them later could see
        # rows in a new file, and would count fewer rows as missing.
        self._accelerator.wait_for_everyone()
        self._compute(collate, rows, batch_size, is_quiet)
        self._accelerator.wait_for_everyone()
        self._files.read()
        if any(row.key not in self._files.keys for row in rows):
            raise ValueError(
                f"{self.folder} does not hold what the other ranks have written: every rank must see the same folder. "
                "Name one that all machines share in the environment variable TRL_EMGUARD_CACHE, or leave "
                "`cache_reference` out."
            )
        size = self._size(rows)
        text = f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
        done = f"{len(missing)} of them computed now" if missing else "all of them found"
        return f"reference cache: {len(rows)} rows ({text}), {done}, in {self.folder}."

    def _find_rows(self, collate: Collate, count: int) -> list[CachedRow]:
        """Return every distinct row with a position that some defense compares, longest row first.

        Sorted rows need little padding in a batch. If any batch is too large for the memory, the first one already
        fails.
        """
        found: dict[bytes, CachedRow] = {}
        for index in range(count):
            inputs, compared = collate([index])
            key = row_keys(inputs, compared)[0]
            if key is not None:
                found[key] = CachedRow(index, key, inputs["input_ids"].shape[1], int(compared.sum()))
        rows = sorted(found.values(), key=lambda row: -row.length)
        if not rows:
            raise ValueError(
                "cache_reference=True, but no training row has a token that a defense looks at: check the labels."
            )
        check_length(self._model, rows[0].length)
        return rows

    def _compute(self, collate: Collate, rows: Sequence[CachedRow], batch_size: int, is_quiet: bool) -> None:
        # The ranks divide all rows, and each rank then skips its rows that are on disk. If they divided only missing
        # rows, ranks that see different files would divide different lists, and could leave a row out. A resumed run
        # may have another number of ranks, because each rank skips the rows that any rank has written.
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        mine = [row for row in rows[rank::ranks] if row.key not in self._files.keys]
        waiting: list[CachedRow] = []
        states: list[dict[str, torch.Tensor]] = []
        with tqdm(
            total=len(mine), desc="Reference cache", unit="row", disable=is_quiet or rank > 0 or not mine
        ) as bar:
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                states.append(self._live(collate, batch))
                waiting += batch
                if self._size(waiting) >= FILE_BYTES or start + batch_size >= len(mine):
                    joined = {name: torch.cat([made[name] for made in states]) for name in self._files.names}
                    self._files.write([row.key for row in waiting], [row.positions for row in waiting], joined)
                    waiting, states = [], []
                bar.update(len(batch))

    def _live(self, collate: Collate, rows: Sequence[CachedRow]) -> dict[str, torch.Tensor]:
        """Run the reference on a batch of rows. Return the states on the CPU, as the cache's files store them.

        The dict maps a name of states, as in the files, to a tensor `(P, H)` in the files' dtype. P is the number of
        kept positions of all the rows.
        """
        inputs, compared = collate([row.index for row in rows])
        # Without this check, states could be written under another row's key.
        if row_keys(inputs, compared) != [row.key for row in rows]:
            raise ValueError(
                "the data collator makes other rows at each call, which have no place in a cache: set "
                "cache_reference=False"
            )
        device = self._accelerator.device
        batch = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        made = self._run({**batch, "use_cache": False}, compared)
        states = {LAST: made.last} | {str(layer): block for layer, block in made.blocks.items()}
        return {name: states[name].to("cpu", self._model.dtype) for name in self._files.names}

    def _check_live(self, collate: Collate, rows: Sequence[CachedRow]) -> None:
        """Recompute the states of a batch of rows. Refuse states on disk that differ from them by more than rounding.

        `rows` are rows whose states are on disk. The folder's name cannot reflect everything that states depend on.
        Examples are weights that the fingerprint's sample misses, a layer that a hook changes, or a precision that
        another library sets.
        """
        if not rows:
            return
        live, kept = self._live(collate, rows), self._files.states([row.key for row in rows])
        is_exact = [self._about[name] for name in ("dtype", "autocast", "matmul")] == ["torch.float32", "no", "ieee"]
        # A row's states are rounded differently in another batch. Relative to their norm, they change by about 1e-6 in
        # fp32, by 1e-2 in bf16, and by more in a quantised model. The limit allows for these changes.
        allowed = 1e-4 if is_exact and not getattr(self._model, "hf_quantizer", None) else 5e-2
        for name, states in live.items():
            # Each difference is divided by the norm of its own state. The first token's state often has a thousand
            # times the norm of the others, so a common divisor would let this one state decide.
            length = states.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            difference = float(((kept[name].float() - states.float()).norm(dim=-1) / length).mean())
            if not difference <= allowed:
                raise ValueError(
                    f"the states in {self.folder} are not those of this run's reference: of {len(rows)} rows they "
                    f"differ by {difference:.2g} of their length. Set cache_reference=False, or delete that folder"
                )

    def _check_disk(self, missing: Sequence[CachedRow]) -> None:
        need, free = self._size(missing), shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"cache_reference=True needs {need / 2**30:.3g} GiB in {self.folder}, where {free / 2**30:.3g} GiB "
                "are free. Free some, name a folder on a larger disk in the environment variable TRL_EMGUARD_CACHE, "
                "or leave `cache_reference` out."
            )

    def _size(self, rows: Sequence[CachedRow]) -> int:
        return self._files.size(sum(row.positions for row in rows))


def reference_cache_dir() -> Path:
    """Return the cache folder, in which every reference has a folder of its own."""
    return cache_dir() / "reference"


def describe_states(
    model: PreTrainedModel, names: Sequence[str], device: str, autocast: str, without: Collection[str] = ()
) -> dict[str, Any]:
    """Describe everything that a reference's states are known to depend on except the rows.

    Args:
        model: causal language model without wrappers.
        names: names of the states that are kept.
        device: type of the device that the pass runs on.
        autocast: mixed precision of the pass, as accelerate names it (`no`, `bf16`, …).
        without: names of the model's adapters that do not act in the pass.
    """
    # The precision of fp32 matrix products is read from this backend. `torch.get_float32_matmul_precision` would raise
    # after transformers' `tf32=True`, which sets the precision through PyTorch's newer interface (`fp32_precision`).
    products: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    config = model.config.to_dict()
    # The following entries of the config do not affect the states, but they change with the model's folder and with
    # the trainer's settings. If they were in the description, states on disk would not be found after such a change.
    for name in ("_name_or_path", "transformers_version", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"):
        config.pop(name, None)
    adapters = {name: x.to_dict() for name, x in getattr(model, "peft_config", {}).items() if name not in without}
    return {
        # Weights enter this hash under the names that they have in a model without adapters. So runs that train
        # different adapters find the same states if the base model is their reference.
        "weights": fingerprint(model, without, is_plain=True),
        "adapters": adapters,
        "config": config,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "matmul": products.matmul.fp32_precision.replace("none", "ieee"),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype),
        "autocast": autocast,
        "device": device,
        "states": list(names),
        "versions": {"trl_emguard": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


def _as_json(about: dict[str, Any]) -> str:
    def plain(value: object) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    return json.dumps(about, indent=2, sort_keys=True, default=plain) + "\n"
