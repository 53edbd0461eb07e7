"""Formulas that estimate each rank's memory from the sizes of model and batches, without a GPU.

The results are estimates. They leave out CUDA's context, the kernels' workspaces, communication buffers and the
allocator's fragmentation. docs/scaling.md compares them with measurements.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.adapters import bare_model
from ..models.blocks import decoder_blocks
from ..ops.head import TILE_BYTES


Reference = Literal["none", "adapters off", "model"]

# Beginning of an optimizer's name -> how many numbers the optimizer keeps for each number of the trained weights. Each
# kept number has the size of the trained one, or one byte if the optimizer's name contains 8bit. An unknown optimizer
# counts like Adam, with two numbers.
STATES = {"adam": 2, "ademamix": 3, "sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
# Bytes that DeepSpeed keeps for each number of the trained weights, assumed for every optimizer: an fp32 copy,
# momentum and variance (K of the ZeRO paper, 1910.02054).
DEEPSPEED_STATES = 12
# Number of 4-bit weights that share one scale. The scale has 32 bits, or 8 bits if scales are quantised as well.
BLOCK_4BIT = 64


@dataclass(frozen=True)
class Engine:
    """Kind of data parallelism that a run uses, and number of its ranks.

    Attributes:
        name: kind of data parallelism; `"fsdp2"` includes FSDP1 with full sharding.
        ranks: number of processes, over all machines.
    """

    name: Literal["one process", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
    ranks: int = 1

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        return self.name in ("zero3", "fsdp2")

    @property
    def shards_gradients(self) -> bool:
        return self.shards_weights or self.name == "zero2"

    @property
    def shards_states(self) -> bool:
        return self.shards_gradients or self.name == "zero1"


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, as its config gives them; `layers` is the number of its blocks."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """Read the sizes from a model's config; sizes that are missing get their usual values."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
        )


@dataclass(frozen=True)
class Weights:
    """Sizes of a model and of parts of it: in bytes, or as a count of the single numbers that the weights consist of.

    Attributes:
        total: numbers in the model, including adapters; a tied weight counts once.
        trained: numbers that are trained.
        itemsize: bytes of a trained number.
        base_itemsize: bytes of a number that is neither quantised nor part of an adapter.
        frozen: bytes of the weights that are not trained.
        base: bytes of the model without adapters, which is also the size of a reference model.
        block: bytes of the largest decoder block, including adapters.
        head: bytes of the output head.
        ends: bytes outside of the blocks: embedding, norm, head.
        cast: numbers in those matrices of the blocks that are kept in fp32. Every pass in bf16 has to cast them.
        trains_head: whether the head is among the trained weights.
        is_tied: whether head and embedding are the same weight.
        adapter_width: sum of the LoRA ranks (`r`) of all adapters in a block; 0 without adapters.
    """

    total: int
    trained: int
    itemsize: int
    base_itemsize: int
    frozen: int
    base: int
    block: int
    head: int
    ends: int
    cast: int
    trains_head: bool
    is_tied: bool
    adapter_width: int

    @property
    def bytes(self) -> int:
        return self.frozen + self.trained * self.itemsize


def count_weights(model: PreTrainedModel | PeftModel) -> Weights:
    """Return the sizes of a model's weights. It may have adapters, and be on any device, also on the meta device."""
    bare = bare_model(model)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    adapters = set(getattr(model, "peft_config", {}))
    of_adapters = {id(p) for name, p in model.named_parameters() if not adapters.isdisjoint(name.split("."))}
    blocks = decoder_blocks(bare)
    inside = {id(p) for p in blocks.parameters()}
    head = list(bare.get_output_embeddings().parameters())
    one_block = [_size(block.parameters()) for block in blocks]
    return Weights(
        total=sum(map(_numbers, parameters)),
        trained=sum(map(_numbers, trained)),
        itemsize=max((p.element_size() for p in trained), default=4),
        base_itemsize=head[0].element_size(),
        frozen=_size(p for p in parameters if not p.requires_grad),
        base=_size(p for p in parameters if id(p) not in of_adapters),
        block=max(one_block),
        head=_size(head[:1]),
        ends=_size(p for p in parameters if id(p) not in inside),
        cast=sum(
            p.numel() for p in blocks.parameters() if type(p) is nn.Parameter and p.ndim == 2 and p.element_size() == 4
        ),
        trains_head=any(p.requires_grad for p in head),
        is_tied=head[0] is bare.get_input_embeddings().weight,
        adapter_width=sum(min(p.shape) for p in blocks[0].parameters() if id(p) in of_adapters and p.ndim == 2) // 2,
    )


def _numbers(parameter: nn.Parameter) -> int:
    # A packed 4-bit parameter holds, by default, two weights in each element (a byte). On the meta device a 4-bit
    # parameter is not packed yet: it holds one weight in each element, and still has a floating dtype.
    packed = type(parameter).__name__ == "Params4bit" and not parameter.is_floating_point()
    return parameter.numel() * (2 if packed else 1)


def _size(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of parameters; a parameter that is listed twice counts once."""
    sizes = {}
    for p in parameters:
        kind = type(p).__name__
        if kind == "Params4bit":
            scale = 1 if getattr(p, "compress_statistics", True) else 4
            sizes[id(p)] = math.ceil(_numbers(p) * (0.5 + scale / BLOCK_4BIT))
        elif kind == "Int8Params":
            sizes[id(p)] = p.numel()
        else:
            sizes[id(p)] = p.numel() * p.element_size()
    return sum(sizes.values())


@dataclass(frozen=True)
class Run:
    """Sizes of a run's batches, and its settings that affect memory and network.

    Attributes:
        rows: rows in a micro-batch of one rank, including rows that defenses add.
        length: tokens in each row, including padding.
        kept: number of positions in the micro-batch whose hidden states the loss needs, including its terms that
            compare policy and reference.
        micro_batches: number of micro-batches of a rank in a step.
        compute_itemsize: bytes of a number in forward and backward passes: 2 under bf16, else 4.
        optimizer: the optimizer's name in the training arguments (`optim`).
        checkpointing: n if every n-th block, from the first on, keeps only its input for the backward pass; 0 if none
            does.
        guarded: whether this package's code for the output head computes the loss, and not TRL's.
        reference: model that the loss compares the policy with: "none", the policy's own base weights
            ("adapters off"), or a separate model ("model").
        cached: whether the reference's states come from disk; a separate reference model then needs only its head in
            memory.
        has_divergence: whether the loss compares next-token distributions.
        layers: number of blocks whose outputs the loss compares.
    """

    rows: int
    length: int
    kept: int
    micro_batches: int = 1
    compute_itemsize: int = 2
    optimizer: str = "adamw_torch"
    checkpointing: int = 1
    guarded: bool = False
    reference: Reference = "none"
    cached: bool = False
    has_divergence: bool = False
    layers: int = 0


def placed(weights: Weights, run: Run, engine: Engine) -> Weights:
    """Return the sizes of the weights in the dtypes in which the run's engine keeps or gathers the weights.

    Under bf16, DeepSpeed casts all weights. FSDP2 keeps trained weights in fp32, and gathers weights in bf16.
    """
    if run.compute_itemsize == 4 or not (engine.is_deepspeed or engine.name == "fsdp2"):
        return weights
    names = ("block", "head", "ends") if engine.name == "fsdp2" else ("frozen", "base", "block", "head", "ends")
    sizes = {name: getattr(weights, name) // 2 for name in names} if weights.base_itemsize == 4 else {}
    if engine.name == "fsdp2":
        return replace(weights, itemsize=4, cast=0, **sizes)
    return replace(weights, itemsize=2, base_itemsize=2, cast=0, **sizes)


def memory_per_rank(weights: Weights, shape: Shape, run: Run, engine: Engine) -> dict[str, int]:
    """Return the bytes that each rank uses in a step: purpose -> bytes.

    Not all of these bytes are in use at the same time (see [`peak`]). Without `run.guarded`, TRL's own head
    computes the loss, and the bytes of that head are left out.
    """
    weights = placed(weights, run, engine)
    n = engine.ranks
    weight_ranks = n if engine.shards_weights else 1
    gathered = 0
    if engine.shards_weights:
        # Two blocks are gathered at a time, the current one and the next. Embedding, last norm and head stay gathered.
        gathered = min(weights.bytes, 2 * weights.block + weights.ends)
    gradients = float(weights.trained * weights.itemsize)
    if engine.name == "ddp":
        gradients *= 2  # DDP's buckets for the all-reduce are copies of the gradients
    elif engine.name == "fsdp2" and run.micro_batches > 1:
        # With accelerate, FSDP2 reduces and scatters gradients only in the last micro-batch. Until then it keeps
        # unsharded gradients, in the dtype of the forward and backward passes.
        gradients = weights.trained * min(weights.itemsize, run.compute_itemsize)
    elif engine.shards_gradients:
        gradients /= n
    reference = (weights.head if run.cached else weights.base) if run.reference == "model" else 0
    if engine.shards_weights and run.reference == "model":
        gathered += min(reference, 2 * weights.block + weights.ends)
    states = optimizer_states(run.optimizer, weights.itemsize, engine)
    has_tied_gradient = weights.trains_head and weights.is_tied
    return {
        "weights": round(weights.bytes / weight_ranks),
        "gathered weights": gathered,
        "gradients": round(gradients),
        "optimizer states": round(weights.trained * states / (n if engine.shards_states else 1)),
        "reference": round(reference / weight_ranks),
        "activations": saved_activations(weights, shape, run),
        "compared states": compared_states(shape, run),
        "head": head_bytes(shape, run),
        # This package's code for the output head sums the gradient of the head's weight over chunks of tokens, in
        # fp32. The gradient is kept until the backward pass ends.
        "trained head": 4 * shape.vocab * shape.hidden if weights.trains_head and run.guarded else 0,
        "backward pass of a block": working_bytes(weights, shape, run),
        "tied embedding": shape.vocab * shape.hidden * weights.itemsize if has_tied_gradient else 0,
        # DeepSpeed needs fp32 gradients for its update.
        "update": round(4 * weights.trained / (n if engine.shards_states else 1)) if engine.is_deepspeed else 0,
    }


def peak(items: dict[str, int], run: Run) -> int:
    """Return the largest number of bytes at one moment, from the items of [`memory_per_rank`].

    Memory peaks while the head computes the loss, at the beginning or the end of the backward pass, or in the update.
    From the second micro-batch of a step on, the gradients of the earlier ones are in memory all the time.
    """
    always = sum(items[name] for name in ("weights", "gathered weights", "optimizer states", "reference"))
    gradients, backward, trained_head = items["gradients"], items["backward pass of a block"], items["trained head"]
    begins = items["activations"] + items["compared states"] + max(items["head"], backward) + trained_head
    if run.micro_batches > 1:
        begins += gradients
    # At block 1, the last in the backward pass, the embedding's gradient (near `trained_head` in size) is not there.
    # At the embedding every gradient exists, and a tied weight has two, until the second is added to the first.
    ends = trained_head + max(gradients - trained_head + backward, gradients + items["tied embedding"])
    return always + max(begins, ends, gradients + items["update"])


def optimizer_states(optimizer: str, itemsize: int, engine: Engine) -> float:
    """Return the bytes of optimizer state for each number of the trained weights."""
    name = optimizer.removeprefix("paged_")
    if engine.is_deepspeed:
        return DEEPSPEED_STATES
    count = next((count for start, count in STATES.items() if name.startswith(start)), 2)
    return count * (1 if "8bit" in name else itemsize)


def block_activations(weights: Weights, shape: Shape, run: Run) -> int:
    """Return the bytes that one block keeps for its backward pass, for each token.

    The formula is for a block with attention that stores no T × T matrix, a gated MLP, and RMS norms in fp32. The
    tensors that a block saves were counted in a Llama model with torch's hooks on saved tensors.
    """
    c, h, attention = run.compute_itemsize, shape.hidden, shape.heads * shape.head_dim
    saved = c * (4 * shape.intermediate + 2 * h + 2 * attention + 2 * shape.kv_heads * shape.head_dim) + 2 * 4 * h
    if not weights.adapter_width:
        # Without adapters the two norms' weights are trained too. The gradient of each needs the normalised states.
        # These states are kept in the compute dtype.
        return saved + c * 2 * h
    if c < weights.itemsize:
        # PEFT casts an adapter's input to the adapter's dtype, and autocast casts it back. Each adapter saves this new
        # copy. Without these casts it would save the input itself, and the input is in memory anyway.
        saved += c * (3 * h + attention)
    return saved + c * weights.adapter_width


def saved_activations(weights: Weights, shape: Shape, run: Run) -> int:
    """Return the bytes that the forward pass of a micro-batch keeps for the backward pass.

    Each block saves its states (a block with checkpointing only its input), and so does the last norm.
    """
    tokens, c, recomputed = run.rows * run.length, run.compute_itemsize, recomputed_blocks(shape, run)
    blocks = recomputed * c * shape.hidden + (shape.layers - recomputed) * block_activations(weights, shape, run)
    return tokens * (blocks + shape.hidden * (4 if weights.adapter_width else 4 + c))


def recomputed_blocks(shape: Shape, run: Run) -> int:
    """Return the number of blocks with checkpointing: they keep only their input, and are computed once more."""
    return math.ceil(shape.layers / run.checkpointing) if run.checkpointing else 0


def working_bytes(weights: Weights, shape: Shape, run: Run) -> int:
    """Return the bytes that a block's backward pass needs: gradients, recomputed states, weights cast to bf16."""
    tokens, c = run.rows * run.length, run.compute_itemsize
    working = tokens * c * (3 * shape.intermediate + shape.hidden)
    if run.checkpointing:
        working += tokens * block_activations(weights, shape, run)
    if c < 4:
        # Frozen weights of a block without checkpointing are kept in bf16 until its backward pass. Among the blocks
        # with checkpointing, only the one that is computed once more has them.
        blocks = shape.layers - recomputed_blocks(shape, run) + 1 if weights.adapter_width else shape.layers
        working += c * (weights.cast * min(blocks, shape.layers) // shape.layers)
    return working


def head_bytes(shape: Shape, run: Run) -> int:
    """Return the bytes that this package's code for the output head needs for loss and gradient.

    The result is 0 without `run.guarded`, because TRL's own code then computes the loss and is not estimated. Counted
    are the fp32 logits of a chunk of tokens (also the reference's, if distributions are compared), their bf16 gradient
    if passes run in bf16, and the gradient of the hidden states at the run's `kept` positions.
    """
    if not run.guarded:
        return 0
    row = shape.vocab * (4 * (2 if run.has_divergence else 1) + (2 if run.compute_itemsize == 2 else 0))
    return min(run.kept * row, max(TILE_BYTES, row)) + run.kept * shape.hidden * run.compute_itemsize


def compared_states(shape: Shape, run: Run) -> int:
    """Return the bytes of the hidden states that the loss needs from policy and reference, at `run.kept` positions.

    Each compared block needs states of reference and policy, and the gradient of the policy's states. The head needs
    states of reference and policy.
    """
    return run.kept * shape.hidden * run.compute_itemsize * (3 * run.layers + 2 * run.guarded)
