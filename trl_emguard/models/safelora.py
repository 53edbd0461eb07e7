"""SafeLoRA: project the updates of a trained LoRA adapter onto the changes that alignment made to the weights.

Source: Hsu et al., *Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models*,
arXiv 2405.16833.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..io.files import check_writable, written_whole
from ..io.strict import parse_json
from .identity import weights_fingerprint
from .lora_files import Factors, factor_key, lora_factors, read_lora, write_lora
from .shipped import last_name, public_name, resolve_model
from .weight_files import WeightFiles


RECORD = "safelora.json"
DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class LayerProjection:
    """Result of the projection for one adapted layer.

    BA is the layer's update. [`project_adapter`] defines the matrix C.

    Attributes:
        name: name of the layer in the model.
        cosine: cos(C·BA, BA), from 0 to 1; `None` where the update BA is zero.
        ratio: ‖C·BA‖ / ‖BA‖ in Frobenius norms; `None` where BA is zero. The ratio differs from the cosine, because C
            is no orthogonal projection: C also scales.
        is_projected: whether B became C·B.
    """

    name: str
    cosine: float | None
    ratio: float | None
    is_projected: bool


@dataclass(frozen=True)
class Projection:
    """Record of an adapter's projection, stored as `safelora.json` in the folder of the projected adapter.

    Attributes:
        threshold: τ of [`project_adapter`].
        base, aligned: name and fingerprint of the model before and after the alignment.
        adapter: name and fingerprint of the adapter that was read.
        weights: fingerprint of the weights that were written.
        layers: results of the adapted layers.
    """

    threshold: float
    base: dict[str, str]
    aligned: dict[str, str]
    adapter: dict[str, str]
    weights: str
    layers: list[LayerProjection]


@torch.no_grad()
def project_adapter(
    adapter: str | os.PathLike, base: str, aligned: str, output: str | os.PathLike, threshold: float = 0.3
) -> Projection:
    """Write a copy of a LoRA adapter, with updates projected in layers where this changes their direction much.

    With V = W_aligned − W_base and C = V Vᵀ / ‖V‖_F, a layer's B becomes C·B where cos(C·BA, BA) ≤ `threshold`. All
    other weights stay as they are. The models are read layer by layer; the computation is in fp64 on the CPU.

    An adapter that was projected before with the same models and threshold is copied unchanged.

    Args:
        adapter: folder of a LoRA adapter that PEFT saved.
        base: weights from before the alignment: a model folder, a shipped name, or a hub id in the hub's cache.
        aligned: weights from after the alignment, on which the adapter was trained.
        output: folder to write, which must be empty or missing. It also gets the record, as `safelora.json`.
        threshold: τ. Cosines are never negative, so −1 projects no layer, and 1 projects all.

    Raises:
        FileNotFoundError: the adapter or a model does not exist.
        ValueError: a threshold outside of [−1, 1]; an adapter that is not a plain LoRA of linear layers, or was
            projected before with other models or another threshold; models that do not fit the adapter or each other,
            or whose files name weights otherwise than the loaded model; an adapter of another base model;
            a layer that the alignment did not change, or with numbers that are not finite; an output that is not
            empty.
    """
    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie between -1 and 1: cosines are compared with it.")
    if output.exists() and not (output.is_dir() and next(output.iterdir(), None) is None):
        raise ValueError(f"output {str(output)!r} is there, and not an empty folder: name another.")
    config, weights = read_lora(adapter)
    _check_trained_on(adapter, config.base_model_name_or_path, base, aligned)
    factors, record = lora_factors(adapter, config, weights), read_record(adapter, weights)
    before, after = WeightFiles("base", base), WeightFiles("aligned", aligned)
    _check_models(before, after, factors, config.fan_in_fan_out)
    check_writable("output", output)

    pair = {
        "base": {"name": before.name, "fingerprint": before.fingerprint()},
        "aligned": {"name": after.name, "fingerprint": after.fingerprint()},
    }
    if record is not None:
        _check_same(adapter, record, threshold, pair)
    else:
        origin = {"name": public_name(str(adapter)), "fingerprint": weights_fingerprint(weights)}
        layers = []
        for name, (a, b) in factors.items():
            projected, cosine, ratio = _project(name, a, b, before, after, config.fan_in_fan_out)
            layers.append(LayerProjection(name, cosine, ratio, cosine is not None and cosine <= threshold))
            if layers[-1].is_projected:
                weights[factor_key(name, "B")] = projected
        record = Projection(threshold, **pair, adapter=origin, weights=weights_fingerprint(weights), layers=layers)
    # The record is written first, so that a projected adapter is never without its record.
    with written_whole(output / RECORD) as scratch:
        scratch.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    write_lora(adapter, weights, output)
    return record


def read_record(adapter: Path, weights: dict[str, torch.Tensor]) -> Projection | None:
    """Return the record of a projected adapter, or `None` if the adapter has no record.

    Args:
        adapter: folder of the adapter.
        weights: the adapter's weights.

    Raises:
        ValueError: the record is damaged, or belongs to other weights.
    """
    path = adapter / RECORD
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        record = Projection(**{**content, "layers": [LayerProjection(**layer) for layer in content["layers"]]})
        for model in (record.base, record.aligned):
            if not all(isinstance(model[key], str) for key in ("name", "fingerprint")):
                raise TypeError("`base` and `aligned` must say their `name` and `fingerprint`")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): copy the adapter again.") from error
    if record.weights != weights_fingerprint(weights):
        raise ValueError(
            f"{path} is not of the weights beside it, so nobody can say whether they are projected. Delete it if "
            "training wrote them."
        )
    return record


def project_factor(
    a: torch.Tensor, b: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, float | None, float | None]:
    """Return C·B, cos(C·BA, BA) and ‖C·BA‖ / ‖BA‖ for C = V Vᵀ / ‖V‖_F, without forming C or BA.

    Args:
        a: factor A, `(r, k)`, fp64.
        b: factor B, `(d, r)`, fp64.
        direction: V, `(d, k)`, fp64, not zero.

    Returns:
        C·B, `(d, r)`; the cosine; and the ratio of norms. Cosine and ratio are `None` if BA is zero.
    """
    projected = direction @ (direction.T @ b) / torch.linalg.vector_norm(direction)
    # With Aᵀ = Q R and orthonormal columns in Q, ⟨X A, Y A⟩ = ⟨X Rᵀ, Y Rᵀ⟩ for any X and Y. So the small matrix Rᵀ
    # replaces A in the norms and in the inner product.
    factor = torch.linalg.qr(a.T, mode="r").R.T
    before, after = b @ factor, projected @ factor
    norm, norm_after = torch.linalg.vector_norm(before).item(), torch.linalg.vector_norm(after).item()
    if norm == 0:
        return projected, None, None
    # The cosine counts as 0 if C maps the update to zero. Rounding can make the quotient larger than 1, so the cosine
    # is limited to 1.
    cosine = min((before * after).sum().item() / (norm * norm_after), 1.0) if norm_after else 0.0
    return projected, cosine, norm_after / norm


def _project(
    name: str, a: torch.Tensor, b: torch.Tensor, base: WeightFiles, aligned: WeightFiles, is_transposed: bool
) -> tuple[torch.Tensor, float | None, float | None]:
    """Read a layer's weights from both models, and return what [`project_factor`] returns, with C·B in B's dtype.

    A layer that the alignment did not change, or with numbers that are not finite, raises `ValueError`.

    Args:
        name: name of the layer.
        a, b: the factors of the layer's update.
        base, aligned: weights of the model before and after the alignment.
        is_transposed: whether the models hold the layer's weight as `(k, d)`.
    """
    direction = aligned.read(f"{name}.weight").double()
    direction -= base.read(f"{name}.weight").double()
    norm = torch.linalg.vector_norm(direction).item()
    if norm == 0:
        raise ValueError(
            f"base {base.name!r} and aligned {aligned.name!r} have the same weights in the layer {name!r}, so the "
            "direction of the alignment is not known there: name the weights from before the alignment as the base, "
            "or train the adapter on layers that the alignment changed."
        )
    projected, cosine, ratio = project_factor(a.double(), b.double(), direction.T if is_transposed else direction)
    if not all(math.isfinite(number) for number in (norm, cosine or 0.0, ratio or 0.0)):
        raise ValueError(
            f"the layer {name!r} of base {base.name!r}, aligned {aligned.name!r} or the adapter holds numbers that "
            "are not finite: its training diverged, or its file is damaged."
        )
    return projected.to(b.dtype), cosine, ratio


def _check_trained_on(adapter: Path, trained_on: str | None, base: str, aligned: str) -> None:
    """Refuse an adapter whose config names a base model other than `base` or `aligned`. It may name either of them."""
    names = {last_name(name) for model in (base, aligned) for name in (model, resolve_model(model))}
    if trained_on and last_name(trained_on) not in names:
        raise ValueError(
            f"adapter {str(adapter)!r} was trained on {trained_on!r}, and aligned is {aligned!r}: give that model as "
            "aligned, and its weights from before the alignment as base. If both are the same weights, set "
            "`base_model_name_or_path` in the adapter's adapter_config.json to this model's name."
        )


def _check_models(base: WeightFiles, aligned: WeightFiles, factors: Factors, is_transposed: bool) -> None:
    """Refuse models that do not fit each other or the adapter, or that hold an adapted layer in quantised form."""
    if base.model_type != aligned.model_type:
        raise ValueError(
            f"base {base.name!r} is a {base.model_type} and aligned {aligned.name!r} a {aligned.model_type}: name the "
            "weights of one model from before and after its alignment."
        )
    for name in base.stored.keys() & aligned.stored.keys():
        shapes = [model.stored[name].shape for model in (base, aligned)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name!r} has shape {shapes[0]} in base {base.name!r} and {shapes[1]} in aligned {aligned.name!r}: "
                "name the weights of one model from before and after its alignment."
            )
    for layer, (a, b) in factors.items():
        shape = (len(b), a.shape[1])
        if f"{layer}.weight" not in base.stored.keys() | aligned.stored.keys():
            raise ValueError(
                f"neither base {base.name!r} nor aligned {aligned.name!r} holds a weight {f'{layer}.weight'!r}, which "
                "the adapter changes: name the models that belong to the adapter. If these do, their files name "
                "weights otherwise than the loaded model, as those of many models that also see images do. SafeLoRA "
                "cannot read them: halve the adapter instead (`trl-emguard rescale`)."
            )
        for argument, model in (("base", base), ("aligned", aligned)):
            stored = model.stored.get(f"{layer}.weight")
            if stored is None:
                raise ValueError(
                    f"{argument} {model.name!r} holds no weight of the layer {layer!r}, which the adapter "
                    "changes: name the models that belong to the adapter."
                )
            if stored.dtype not in DTYPES:
                raise ValueError(
                    f"{argument} {model.name!r} holds the layer {layer!r} as {stored.dtype}: name the model before "
                    "its quantisation."
                )
            if stored.shape != (shape[::-1] if is_transposed else shape):
                raise ValueError(
                    f"the adapter changes a weight of shape {shape} in the layer {layer!r}, and {argument} "
                    f"{model.name!r} has {stored.shape} there: name the models that belong to the adapter."
                )


def _check_same(adapter: Path, record: Projection, threshold: float, pair: dict[str, dict[str, str]]) -> None:
    """Refuse an adapter that was projected before with other models or another threshold."""
    earlier = {"base": record.base["fingerprint"], "aligned": record.aligned["fingerprint"]}
    if record.threshold == threshold and earlier == {key: model["fingerprint"] for key, model in pair.items()}:
        return
    raise ValueError(
        f"adapter {str(adapter)!r} was projected already (base {record.base['name']!r}, aligned "
        f"{record.aligned['name']!r}, threshold {record.threshold}), and would be projected twice: name the adapter "
        "that training saved."
    )
