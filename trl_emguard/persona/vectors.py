"""Persona vectors (for each layer, a direction of the hidden states that stands for a trait), and their files."""

import json
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..io.files import written_whole
from ..io.lookup import did_you_mean
from ..io.strict import parse_json
from ..models.identity import FP16, weight_checksums
from ..models.rotation import rotated


VECTORS_DIR = Path(__file__).parent / "shipped"
SHIPPED_VECTORS = ("smollm2-135m-instruct-evil", "smollm2-135m-instruct-capitals")

EXTRACTED, RANDOM, FOREIGN = "extracted", "random", "foreign"
# `PER_LAYER` names the metadata whose value is a list of one number per layer. `FACTS` names other metadata, with the
# type of each value. [`PersonaVector`] refuses a value of another type.
PER_LAYER = ("norms", "auroc", "separation", "random_auroc", "state_norms")
FACTS = {"trait": str, "model": str, "rule": str, "pairs": int, "kept": int, "heldout": int}


@dataclass(frozen=True)
class PersonaVector:
    """Persona vector: per layer, mean state of answers that show a trait minus that of answers showing its opposite.

    Attributes:
        vectors: `(L + 1, H)`, fp32. Index l ≥ 1 belongs to the raw output of block l, index 0 to the input of block 1.
        kind: `"extracted"`, `"random"` (a control), or `"foreign"` (a `.pt` file of another codebase, whose last entry
            was taken after the final norm and so is not a block's output).
        metadata: facts from the file, of JSON types: `trait`, `model`, `weights` (a checksum of each weight of the
            model that the vector was made with), `suggested_layer`, `foreign` (True for the control of a foreign
            vector), and `norms`, `auroc`, `separation`, `random_auroc`, `state_norms`, each one number per layer.

    Raises:
        ValueError: the shape is wrong, numbers are not finite, or metadata have wrong types.
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
        """Euclidean norms of the rows of `vectors`: one for each layer, from 0 to the last."""
        return self.vectors.norm(dim=1).tolist()

    @property
    def foreign(self) -> bool:
        """True for a vector from a `.pt` file of another codebase, and for a random control made from such a vector.

        The last entry of such a `.pt` vector was taken after the final norm, so neither has a direction for the last
        block's output.
        """
        return self.kind == FOREIGN or bool(self.metadata.get("foreign"))

    @property
    def suggested_layer(self) -> int | None:
        return self.metadata.get("suggested_layer")

    @property
    def checksum(self) -> str:
        """Checksum of the numbers in `vectors` alone, not of `kind` and `metadata`: eight hexadecimal digits."""
        return f"{zlib.crc32(self.vectors.contiguous().numpy().tobytes()):08x}"

    def _file_checksum(self, facts: str) -> str:
        """Return the checksum that `save` stores in the file, and that `load_vector` computes again to detect damage.

        It covers `vectors`, `kind` and `facts`, the JSON text of metadata and norms.
        """
        return f"{zlib.crc32(f'{self.checksum} {self.kind} {facts}'.encode()):08x}"

    def check_shape(self, num_layers: int, hidden_size: int) -> None:
        """Raise `ValueError` if a model's number of blocks or width differs from the vector's."""
        if (self.num_layers, self.hidden_size) != (num_layers, hidden_size):
            raise ValueError(
                f"the persona vector is of a model with {self.num_layers} blocks of width {self.hidden_size}, and "
                f"this one has {num_layers} of width {hidden_size}. Make one with this model: `trl-emguard persona "
                "extract`."
            )

    def check_layer(self, name: str, value: object, layer: int) -> None:
        """Raise `ValueError` for a layer that is out of range, and for the last layer if the vector is `foreign`.

        A foreign vector comes from a `.pt` file of another codebase, or is a random control made from such a vector.
        It has no direction for the last block's output.

        Args:
            name, value: name and value of the argument that selects the layer, for the error message.
            layer: index of a block.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"{name}={value!r} is out of range: the blocks count from 1 to {self.num_layers}.")
        if self.foreign and layer == self.num_layers:
            raise ValueError(
                f"{name}={value!r} includes the last block, {layer}, and the last entry of a .pt vector was taken "
                "after the final norm: it is no block's output. Choose lower layers, or make the vector with "
                "`trl-emguard persona extract`."
            )

    def check_model(self, model: PreTrainedModel) -> int:
        """Compare a model's weights, by checksums, with those of the model that the vector was made with.

        Weights that are quantised, sharded by FSDP or offloaded are left out, and so are weights that are fp16 in only
        one of the two models.

        Args:
            model: causal language model without wrappers; adapters are left out.

        Returns:
            The number of compared weights, which are all equal. 0 means that nothing could be compared.

        Raises:
            ValueError: a weight, the number of blocks or the width differs.
        """
        config = model.config.get_text_config()
        self.check_shape(config.num_hidden_layers, config.hidden_size)
        theirs, ours = self.metadata.get("weights", {}), weight_checksums(model)
        # An fp16 weight's checksum is computed from fp16 numbers, any other weight's from numbers rounded to bf16. The
        # two kinds of checksum differ even for the same weight, so they are not compared.
        compared = [
            name
            for name in sorted(theirs.keys() & ours.keys())
            if theirs[name].startswith(FP16) == ours[name].startswith(FP16)
        ]
        for name in compared:
            if theirs[name] != ours[name]:
                raise ValueError(
                    f"the persona vector was made with another model ({self.metadata.get('model') or 'unnamed'}): the "
                    f"weight {name!r} differs. Make one with this model: `trl-emguard persona extract`."
                )
        return len(compared)

    def save(self, path: str | os.PathLike) -> None:
        """Write the vector as safetensors, in one atomic step."""
        facts = json.dumps({**self.metadata, "norms": self.norms})
        metadata = {"kind": self.kind, "persona_vector": facts, "checksum": self._file_checksum(facts)}
        with written_whole(path) as scratch:
            save_file({"vectors": self.vectors.float().contiguous()}, scratch, metadata)


def load_vector(name: str | os.PathLike) -> PersonaVector:
    """Load a vector from a `.safetensors` or `.pt` file, or a shipped one by its name.

    A `.pt` file must hold one tensor of shape (layers + 1, hidden). Nothing in a file is ever executed.

    Raises:
        FileNotFoundError: `name` is neither a file nor a shipped vector.
        ValueError: a damaged file, or one that holds no persona vector.
    """
    path = VECTORS_DIR / f"{name}.safetensors" if str(name) in SHIPPED_VECTORS else Path(os.path.expanduser(name))
    if not path.is_file():
        hint = did_you_mean(str(name), SHIPPED_VECTORS)
        raise FileNotFoundError(
            f"persona vector {str(name)!r} is neither a file nor a shipped vector.{hint} Shipped: "
            f"{', '.join(SHIPPED_VECTORS)}; `trl-emguard persona extract` makes one."
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
        # Files that were written before this package added checksums have none (for example the shipped evil vector).
        # A missing checksum is therefore accepted.
        if header.get("checksum") not in (None, vector._file_checksum(header["persona_vector"])):
            raise ValueError("its checksum is another")
        return vector
    # The readers of safetensors, zip and torch raise many types of errors on damaged bytes, so every type is caught.
    except Exception as error:
        raise ValueError(f"{path} is no persona vector, or is damaged ({type(error).__name__}: {error}).") from error


def _load_pt(path: Path) -> torch.Tensor:
    """Return the tensor `(L + 1, H)` in a `.pt` file, fp32."""
    # A `.pt` file is a zip archive. torch would unpack a compressed part of it to any size, so an archive with such a
    # part is refused. torch also does not validate the archive's checksums, so `testzip` does.
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is packed, and torch packs nothing")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is another")
    vectors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(vectors, torch.Tensor) or not vectors.is_floating_point():
        raise ValueError(f"it holds a {type(vectors).__name__}, not a tensor of numbers")
    # With strides of 0, a tensor of any shape needs only a few stored bytes, and a later copy of it could fill the
    # memory. So the storage must hold every element.
    if vectors.dim() != 2 or vectors.numel() * vectors.element_size() > vectors.untyped_storage().nbytes():
        raise ValueError(f"it must hold a tensor of shape (layers + 1, hidden), got {tuple(vectors.shape)}")
    return vectors.detach().float()


def _is_number(value: object) -> bool:
    """Return True if a value from JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def random_like(vector: PersonaVector, seed: int = 0) -> PersonaVector:
    """Make a random vector that has the given vector's norm in every layer: a control for claims about that vector.

    The same random rotation is applied to all layers, so the increments v(l) − v(l − 1) keep their norms too. The
    direction in each layer is uniformly random.
    """
    rows = rotated(vector.vectors.T, torch.Generator().manual_seed(seed)).T.float()
    kept: dict[str, Any] = {
        key: vector.metadata[key] for key in ("trait", "model", "weights", "suggested_layer") if key in vector.metadata
    }
    if vector.foreign:
        kept["foreign"] = True
    return PersonaVector(rows.contiguous(), RANDOM, {**kept, "like": vector.checksum, "seed": seed})
