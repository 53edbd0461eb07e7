"""Formula that estimates each rank's network traffic from the sizes of model and batches, without a network."""

from dataclasses import replace

from .memory import Engine, Run, Weights, placed


def network_per_step(weights: Weights, run: Run, engine: Engine) -> dict[str, int]:
    """Return the bytes that each rank sends (and receives) in a step: purpose -> bytes.

    Bytes are counted like in the ZeRO paper (1910.02054): an all-gather or reduce-scatter moves (n − 1)/n of the data,
    an all-reduce twice as much.
    """
    share = (engine.ranks - 1) / engine.ranks
    weights = placed(weights, run, engine)
    if engine.name == "fsdp2":
        # FSDP2 casts weights and gradients to the dtype of the forward and backward passes before it sends them.
        shrink = weights.base_itemsize // min(weights.base_itemsize, run.compute_itemsize)
        weights = replace(weights, frozen=weights.frozen // shrink, base=weights.base // shrink)
        weights = replace(weights, itemsize=min(weights.itemsize, run.compute_itemsize))
    gradient, m = weights.trained * weights.itemsize, run.micro_batches
    volume = {"weights, forward": 0, "weights, backward": 0, "weights, recomputed": 0, "weights, reference": 0}
    volume |= {"gradients": 0, "weights, updated": 0}
    if engine.shards_weights:
        volume["weights, forward"] = volume["weights, backward"] = weights.bytes * m
        if run.checkpointing and engine.is_deepspeed:
            # DeepSpeed gathers weights once more for the recomputed forward pass, and FSDP2 does not. The number is an
            # upper bound, because DeepSpeed keeps weights that it needs again within `stage3_max_reuse_distance`, and
            # with `every_n_layers` only every n-th block is recomputed.
            volume["weights, recomputed"] = weights.bytes * m
        if run.reference == "adapters off" and not run.cached:
            volume["weights, reference"] = weights.bytes * m
        elif run.reference == "model" and not run.cached:
            volume["weights, reference"] = weights.base * m
        # DeepSpeed reduces gradients in every micro-batch, FSDP2 only in the last one of a step.
        volume["gradients"] = gradient * (m if engine.is_deepspeed else 1)
    elif engine.name == "zero2":
        volume["gradients"], volume["weights, updated"] = gradient * m, gradient
    elif engine.name == "zero1":
        volume["gradients"], volume["weights, updated"] = gradient, gradient
    elif engine.name == "ddp":
        volume["gradients"] = 2 * gradient
    return {name: round(size * share) for name, size in volume.items()}
