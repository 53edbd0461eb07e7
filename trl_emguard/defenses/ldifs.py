"""LDIFS: ℓ2 distance to the reference model in feature space (Mukhoti et al., 2308.13320).

Kaczér et al. (2508.06249) use it against emergent misalignment.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..ops import feature_distance
from .base import IN_TRAINING_DEFENSES, Paper, ReferenceDefense
from .options import check_flag, listed_layers, option
from .schedule import Coefficient, check_coefficient


@dataclass
class LDIFSOptions:
    """Options of `ldifs`: penalty on the distance between block outputs of the policy and of a reference model."""

    ldifs_coef: Coefficient = option(
        1.0, "Weight of the distance to the reference in feature space. 0 switches it off."
    )
    # The declared type is `str`, because for `str | list[int]` the argument parser of transformers drops the default
    # and gives None. In Python, a list works as well.
    ldifs_layers: str = option(
        "every:5",
        "Blocks whose raw outputs are compared, counted from 1 to L: 'every:5' for 5, 10, ..., 'linspace:5' for five "
        "from 1 to L, '4,8' for a list.",
    )
    ldifs_normalize: bool = option(
        True, "Whether each token's state is scaled to unit length before the distance is taken."
    )


class LDIFS(ReferenceDefense):
    """Loss `L = CE + ldifs_coef · (1/N) Σ_t mean_l ‖x̂_l,t − x̂⁰_l,t‖²` over the N positions that predict a label.

    x_l is the raw output of block l in the policy, and x⁰_l that in the reference. x̂ is x scaled to unit length per
    token; with `ldifs_normalize=False` x itself is compared. The code released with the paper on emergent misalignment
    detaches the outputs of both models, so its LDIFS term has no gradient. Here the policy's outputs stay attached.
    """

    name = "ldifs"
    papers = (
        Paper("Fine-tuning can cripple your foundation model; preserving features may be the solution", "2308.13320"),
        IN_TRAINING_DEFENSES,
    )
    Options = LDIFSOptions
    switch = "ldifs_coef"

    def __init__(self, args: Any):
        self.weigh(args.ldifs_coef)
        self.normalize = args.ldifs_normalize
        # A list is stored as sorted numbers, and a rule such as "every:5" as text without spaces. So "4,8" and [4, 8]
        # count as the same option when a run resumes.
        self.layers_spec = select_layers(args.ldifs_layers, num_layers=None) or str(args.ldifs_layers).replace(" ", "")

    @classmethod
    def check_options(cls, args: Any) -> None:
        check_coefficient("ldifs_coef", args.ldifs_coef)
        check_flag("ldifs_normalize", args.ldifs_normalize)
        select_layers(args.ldifs_layers, num_layers=None)

    def options(self) -> dict[str, Any]:
        return {
            "ldifs_coef": self.coefficient,
            "ldifs_layers": self.layers_spec,
            "ldifs_normalize": self.normalize,
        }

    def check_model(self, config: PreTrainedConfig) -> None:
        self.layers(config.num_hidden_layers)

    def layers(self, num_layers: int) -> Sequence[int]:
        return select_layers(self.layers_spec, num_layers)

    def token_loss(self, policy: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
        return feature_distance(policy, reference, self.normalize)


def select_layers(spec: object, num_layers: int | None) -> list[int]:
    """Return the sorted numbers of the blocks that `ldifs_layers` selects, counted from 1 to `num_layers`.

    The output of block L is meant before the model's final norm, unlike the last entry of `hidden_states`.

    Args:
        spec: `"every:5"` for 5, 10, …; `"linspace:5"` for five from 1 to L, evenly spread; `"4,8"`, `"[4, 8]"`, `4` or
            `[4, 8]` for a list.
        num_layers: L; `None` to check only the form, before the model is known. `"every"` and `"linspace"` then give
            an empty list.

    Raises:
        ValueError: `spec` has another form, lists a layer twice, or names a layer outside 1 … L or none at all.
    """
    message = f"ldifs_layers={spec!r}"
    rule = re.fullmatch(r"\s*(every|linspace):\s*(\d+)\s*", spec) if isinstance(spec, str) else None
    if rule is not None:
        kind, count = rule[1], int(rule[2])
        if count < 1:
            raise ValueError(f"{message}: the number after {kind!r} must be 1 or more.")
        if num_layers is None:
            return []
        if kind == "every":
            layers = list(range(count, num_layers + 1, count))
        elif count > num_layers:
            layers = []
        elif count == 1:
            layers = [num_layers]
        else:
            layers = torch.linspace(1, num_layers, count, dtype=torch.float64).round().int().tolist()
        if not layers:
            raise ValueError(
                f"{message} names no layer of a model with {num_layers} blocks: give a smaller number or a list."
            )
        return layers
    return listed_layers("ldifs_layers", spec, num_layers, "'every:5', 'linspace:5', '4,8' or [4, 8]")
