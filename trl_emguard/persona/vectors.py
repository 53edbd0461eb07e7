"""A persona vector: one direction per layer, and the file that holds it."""

import difflib
import json
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..io.files import written_whole
from ..io.strict import parse_json
from ..models.sharding import gathered


VECTORS_DIR = Path(__file__).parent / "shipped"
SHIPPED_VECTORS = ("smollm2-135m-instruct-evil",)

EXTRACTED, RANDOM, FOREIGN = "extracted", "random", "foreign"
# What begins the checksum of an fp16 weight.
FP16 = "fp16:"
# Where PEFT keeps the module that it put an adapter on.
ORIGINALS = ("base_layer", "original_module")
PER_LAYER = ("norms", "auroc", "separation", "random_auroc", "state_norms")
FACTS = {"trait": str, "model": str, "rule": str, "pairs": int, "kept": int, "heldout": int}


@dataclass(frozen=True)
class PersonaVector:
    """Mean states under the trait minus mean states under its opposite, per layer.

    Attributes:
        vectors: `(L + 1, H)`, fp32. Index l ≥ 1 is about the raw output of block l, index 0 about what enters block 1.
        kind: `"extracted"`, `"random"` (a control), or `"foreign"` (a `.pt` of another codebase, whose last entry is after
            the final norm and so is no block's output).
        metadata: what the file says of it, as JSON: `trait`, `model`, `weights` (a checksum per weight of the model that it was
            made with), `suggested_layer`, `foreign` (of the control of a foreign vector), and per layer `norms`, `auroc`,
            `separation`, `random_auroc`, `state_norms`.

    Raises:
        ValueError: another shape, numbers that are not finite, or metadata that is not of these kinds.
    """

    vectors: torch.Tensor
    kind: str = EXTRACTED
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        shape = tuple(self.vectors.shape)
        if len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
            raise ValueError(f"a persona vector must have shape (layers + 1, hidden), got {shape}.")
        if not self.vectors.isfinite().all():
            raise ValueError("the persona vector holds NaN or infinite numbers: make it again.")
        weights, layer = self.metadata.get("weights", {}), self.suggested_layer
        if not isinstance(weights, dict) or not all(isinstance(value, str) for value in weights.values()):
            raise ValueError("the `weights` in its metadata are no dict of checksums")
        if layer is not None and (type(layer) is not int or not 1 <= layer <= self.num_layers):
            raise ValueError(
                f"its metadata says suggested_layer={layer!r}, and the blocks count from 1 to {self.num_layers}"
            )
        for key in PER_LAYER:
            values = self.metadata.get(key, [0.0] * shape[0])
            if not isinstance(values, list) or len(values) != shape[0] or not all(map(_is_number, values)):
                raise ValueError(
                    f"its metadata says {key}={values!r}, which is not {shape[0]} numbers, one per layer from 0 on"
                )
        for key, kind in FACTS.items():
            if not isinstance(self.metadata.get(key, kind()), kind):
                raise ValueError(f"its metadata says {key}={self.metadata[key]!r}, which is no {kind.__name__}")

    @property
    def num_layers(self) -> int:
        return self.vectors.shape[0] - 1

    @property
    def hidden_size(self) -> int:
        return self.vectors.shape[1]

    @property
    def norms(self) -> list[float]:
        """‖v(l)‖ for l = 0 … L."""
        return self.vectors.norm(dim=1).tolist()

    @property
    def foreign(self) -> bool:
        """Whether the last entry was taken after the final norm, or is a control of such a one: it is no block's output."""
        return self.kind == FOREIGN or bool(self.metadata.get("foreign"))

    @property
    def suggested_layer(self) -> int | None:
        return self.metadata.get("suggested_layer")

    @property
    def checksum(self) -> str:
        """Of the numbers alone: eight hexadecimal digits."""
        return f"{zlib.crc32(self.vectors.contiguous().numpy().tobytes()):08x}"

    def _file_checksum(self, facts: str) -> str:
        """Of all that a file holds; `facts` is its metadata as it stands there."""
        return f"{zlib.crc32(f'{self.checksum} {self.kind} {facts}'.encode()):08x}"

    def check_shape(self, num_layers: int, hidden_size: int) -> None:
        """Raises `ValueError` if the vector is of a model of another size."""
        if (self.num_layers, self.hidden_size) != (num_layers, hidden_size):
            raise ValueError(
                f"the persona vector is of a model with {self.num_layers} blocks of width {self.hidden_size}, and this one has "
                f"{num_layers} of width {hidden_size}. Make one with this model: `trl-emguard persona extract`."
            )

    def check_layer(self, name: str, value: object, layer: int) -> None:
        """Raises `ValueError` if the vector has no entry for the output of block `layer`, which the argument `name` asks for."""
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"{name}={value!r} is out of range: the blocks count from 1 to {self.num_layers}.")
        if self.foreign and layer == self.num_layers:
            raise ValueError(
                f"{name}={value!r} includes the last block, {layer}, and the last entry of a .pt vector was taken after the final "
                "norm: it is no block's output. Choose lower layers, or make the vector with `trl-emguard persona extract`."
            )

    def check_model(self, model: PreTrainedModel) -> int:
        """Compare the weights that the vector was made with to a model's, as far as they can be compared: what is quantised,
        sharded by FSDP or offloaded cannot, nor fp16 with another dtype.

        Args:
            model: causal language model without wrappers; adapters are left out.

        Returns:
            The number of weights that were compared, all alike. 0 says that nothing is known.

        Raises:
            ValueError: a weight differs.
        """
        theirs, ours = self.metadata.get("weights", {}), weight_checksums(model)
        # What fp16 made of a number cannot be told from its bf16.
        compared = [
            name
            for name in sorted(theirs.keys() & ours.keys())
            if theirs[name].startswith(FP16) == ours[name].startswith(FP16)
        ]
        for name in compared:
            if theirs[name] != ours[name]:
                raise ValueError(
                    f"the persona vector was made with another model ({self.metadata.get('model') or 'unnamed'}): the weight "
                    f"{name!r} differs. Make one with this model: `trl-emguard persona extract`."
                )
        return len(compared)

    def save(self, path: str | os.PathLike) -> None:
        """Write the vector as safetensors, whole or not at all."""
        facts = json.dumps({**self.metadata, "norms": self.norms})
        metadata = {"kind": self.kind, "persona_vector": facts, "checksum": self._file_checksum(facts)}
        with written_whole(path) as scratch:
            save_file({"vectors": self.vectors.float().contiguous()}, scratch, metadata)


def load_vector(name: str | os.PathLike) -> PersonaVector:
    """A vector from a `.safetensors` file, from a `.pt` tensor of shape (layers + 1, hidden) as the field passes them
    around, or a shipped one by its name.

    Raises:
        FileNotFoundError: neither a file nor a shipped name.
        ValueError: a damaged file, or one that holds no persona vector. Nothing in it is ever executed.
    """
    path = VECTORS_DIR / f"{name}.safetensors" if str(name) in SHIPPED_VECTORS else Path(os.path.expanduser(name))
    if not path.is_file():
        near = difflib.get_close_matches(str(name), SHIPPED_VECTORS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise FileNotFoundError(
            f"persona vector {str(name)!r} is neither a file nor a shipped vector. {hint}Shipped: {', '.join(SHIPPED_VECTORS)}; "
            "`trl-emguard persona extract` makes one."
        )
    try:
        if path.suffix in (".pt", ".pth"):
            vectors = _load_pt(path)
            return PersonaVector(vectors, FOREIGN, {"norms": vectors.norm(dim=-1).tolist()})
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            metadata = parse_json(header["persona_vector"])
            if header["kind"] not in (EXTRACTED, RANDOM, FOREIGN) or not isinstance(metadata, dict):
                raise ValueError(f"kind={header['kind']!r}")
            stored = file.get_tensor("vectors")
        if not stored.is_floating_point():
            raise ValueError(f"it holds {stored.dtype}, not a tensor of numbers")
        vector = PersonaVector(stored.float(), header["kind"], metadata)
        # Files of version 0.1.0 have none.
        if header.get("checksum") not in (None, vector._file_checksum(header["persona_vector"])):
            raise ValueError("its checksum is another")
        return vector
    # What the readers raise on damaged bytes is no closed list.
    except Exception as error:
        raise ValueError(f"{path} is no persona vector, or is damaged ({type(error).__name__}: {error}).") from error


def _load_pt(path: Path) -> torch.Tensor:
    """The tensor `(L + 1, H)` in a `.pt` file, fp32."""
    # torch itself does not look at the checksums of its files, and unpacks what is packed, to whatever size.
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is packed, and torch packs nothing")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is another")
    vectors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(vectors, torch.Tensor) or not vectors.is_floating_point():
        raise ValueError(f"it holds a {type(vectors).__name__}, not a tensor of numbers")
    # A few bytes can be spread over any shape.
    if vectors.dim() != 2 or vectors.numel() * vectors.element_size() > vectors.untyped_storage().nbytes():
        raise ValueError(f"it must hold a tensor of shape (layers + 1, hidden), got {tuple(vectors.shape)}")
    return vectors.detach().float()


def _is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def random_like(vector: PersonaVector, seed: int = 0) -> PersonaVector:
    """A random vector with the same norm in every layer: the control that a claim about a persona vector needs.

    All layers are turned by one random rotation, so the increments v(l) − v(l − 1) keep their norms too, and in each layer
    the direction is uniformly random.
    """
    rows = vector.vectors.double()
    generator = torch.Generator().manual_seed(seed)
    # rows = Rᵀ Qᵀ spans a small space; a random frame takes the place of its basis Q.
    upper = torch.linalg.qr(rows.T).R
    frame = torch.linalg.qr(torch.randn(rows.shape[1], upper.shape[0], generator=generator, dtype=torch.float64)).Q
    kept: dict[str, Any] = {
        key: vector.metadata[key] for key in ("trait", "model", "weights", "suggested_layer") if key in vector.metadata
    }
    if vector.foreign:
        kept["foreign"] = True
    return PersonaVector((upper.T @ frame.T).float(), RANDOM, {**kept, "like": vector.checksum, "seed": seed})


def weight_checksums(model: nn.Module) -> dict[str, str]:
    """A checksum of some numbers of every weight, by its name in the model without adapters.

    The numbers are rounded to bf16, so that it makes no difference whether a model is loaded in fp32 or bf16; those of fp16
    weights are marked. They come from a weight's first rows: a vocabulary that grew is still the same model's. Adapters, quantised
    and offloaded weights and FSDP's shards are left out, and so are the weights below an adapter whose initialisation may have
    changed them (PiSSA, OLoRA). ZeRO-3's shards are gathered one by one, on every rank.
    """
    adapters = getattr(model, "peft_config", {})
    keeps_base = not any(isinstance(getattr(config, "init_lora_weights", None), str) for config in adapters.values())
    added = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name, parameter in module.named_parameters()
        if name.split(".")[0] not in ORIGINALS
    }
    checksums = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if id(parameter) in added or isinstance(parameter, DTensor) or parameter.is_meta:
            continue
        if "base_layer" in parts and not keeps_base:
            continue
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue
        with gathered(parameter):  # what ZeRO-3 loaded in shards
            rows = parameter.detach()[:64].flatten()
            # An odd stride goes through the columns as well.
            sample = rows[:: max(1, rows.numel() // 64) | 1].cpu()
        if not sample.numel():
            continue
        half = parameter.dtype == torch.float16
        sample = (sample if half else sample.bfloat16()).contiguous()
        plain = ".".join(part for part in parts if part not in ORIGINALS)
        checksums[plain] = f"{FP16 if half else ''}{zlib.crc32(sample.view(torch.uint8).numpy().tobytes()):08x}"
    return checksums
