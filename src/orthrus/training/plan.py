"""Computes what a training run needs: memory by part, operations, tokens and hours. Pure functions.

Names in the formulas: C hidden size, q and kv the widths of all query heads and of all key heads, H query heads,
I width of the MLP that a row meets, V vocabulary, L layers, T sequence_length, B micro_batch_size, N num_anchors,
K block_size, Q = B N K block rows, c bytes of a number in `dtype`. Frozen weights need no gradient, so autograd keeps
no activations for them. So a step needs much less memory than a step of full training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from orthrus.training.losses import CHUNK

GPUS: Mapping[str, tuple[float, float, int]] = {
    "a100": (312e12, 19.5e12, 80),
    "h100": (989e12, 67e12, 80),
    "h200": (989e12, 67e12, 141),
    "b200": (2250e12, 75e12, 180),
    "l40s": (362e12, 92e12, 48),
    "rtx4090": (165e12, 83e12, 24),
}
"""By name: operations per second without sparsity in bfloat16 and in float32, as the maker states them, and GB."""
BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
_FIXED_BYTES = 1_000_000_000
_FRAGMENTED = 0.05
_NORMS_BEFORE = 2
Attention = Literal["dense", "flex"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a base and a view that the formulas need.

    parameters: of the base. root_parameters: of the base outside its layers. layer_parameters: of a layer.
    layer_weights: weights of a layer by which a row is multiplied (of experts, only the chosen ones). view_parameters:
    of the view. trained_parameters: those of them that are trained. view_layer_parameters: those in the layer that has
    most. view_weights: weights of a layer by which a block row is multiplied instead of the base's (full twins) or in
    addition (low_rank). hidden_norms: number of a layer's norms over the hidden size. head_norms: whether queries and
    keys have norms. wide_head_norms: whether these multiply in float32. trained_head_norms: whether these are trained.
    qkv_input, o_input, mlp_inputs, rank_values: the inputs of trained projections of a layer that are kept for
    gradients. experts: (all, chosen), None for a plain MLP.
    """

    parameters: int
    root_parameters: int
    layer_parameters: int
    layer_weights: int
    view_parameters: int
    trained_parameters: int
    view_layer_parameters: int
    view_weights: int
    low_rank: bool
    num_layers: int
    twin_layers: tuple[int, ...]
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    hidden_norms: int
    pre_norm: bool
    fused_qkv: bool
    head_norms: bool
    wide_head_norms: bool
    trained_head_norms: bool
    qkv_input: bool
    o_input: bool
    mlp_inputs: int
    rank_values: int
    experts: tuple[int, int] | None
    softcap: bool
    capped_logits: bool
    rope_tables: int
    windowed: bool
    trained_mask: bool
    repair_rank: int
    trains_twins: bool

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def values(self) -> int:
        """Numbers that are kept for a row's value: the whole output if one projection makes query, key and value."""
        return self.queries + 2 * self.keys if self.fused_qkv else self.keys

    @property
    def repair_parameters(self) -> int:
        return self.repair_rank * (3 * self.hidden + 1)

    @property
    def learning_layers(self) -> range:
        """Layers that keep activations: all from the first one with a twin on; all layers with a trained mask."""
        if not self.trains_twins:
            return range(0)
        first = 0 if self.trained_mask else min(self.twin_layers, default=self.num_layers)
        return range(first, self.num_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of one pass of one process: B, T, N and K, and these.

    targets: targets of a block with weight. read_rows: AR rows that a block row reads, on average. rejected_share:
    share of blocks that are probed and moved first. recomputed: whether layers keep only their input.
    """

    micro_batch_size: int
    sequence_length: int
    num_anchors: int
    block_size: int
    targets: float
    read_rows: float
    rejected_share: float = 0.0
    dtype_bytes: int = 2
    attention: Attention = "flex"
    recomputed: bool = False

    @property
    def block_rows(self) -> int:
        return self.micro_batch_size * self.num_anchors * self.block_size

    @property
    def target_rows(self) -> float:
        return self.micro_batch_size * self.num_anchors * self.targets

    @property
    def teacher_rows(self) -> float:
        """Rows of the AR pass whose distribution is a target; blocks share such rows."""
        return min(self.micro_batch_size * self.sequence_length, self.target_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process, by part."""

    base_weights: int
    view_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def layer_bytes(shape: Shape, work: Work, layer: int) -> float:
    """Bytes that autograd keeps of one layer for each block row.

    norms, (4 C + 4) each: the row in float32, and its scale
    inputs of trained projections: c C before q, k and v; c q before o, where attention does not keep it already;
        c (C + I) of an MLP with twins; c r for every low-rank part
    query and key norms: 4 (q + kv) + 4 (H + H_kv), and of those that learn their outputs, w (q + kv), w being 4
        where they multiply in float32, else c
    attention: c (2 q + kv + v) for query, output, key and value, v being kv, or q + 2 kv where one projection makes
        all three; dense: c H (S + K) probabilities, S being the AR rows
        read, and 4 H (S + K) more where scores are capped; flex: 4 H
    MLP: 3 c I (gate, its activation, up); of experts k (c (3 I + C + 1) + 32) and 4 E of the router, k of E being
        chosen
    """
    c, twinned = work.dtype_bytes, layer in shape.twin_layers
    q, kv, heads = shape.queries, shape.keys, shape.heads
    norms = shape.hidden_norms
    # Activations before the first trained parameter are not kept.
    if layer == shape.learning_layers.start and shape.pre_norm and not shape.trained_mask:
        norms -= 1
    total = norms * (4.0 * shape.hidden + 4)
    if twinned:
        total += c * (shape.hidden * shape.qkv_input + shape.mlp_inputs + shape.rank_values)
        if shape.o_input and work.attention == "flex":
            total += c * q
    if shape.head_norms:
        total += 4.0 * (q + kv) + 4.0 * (heads + shape.kv_heads)
        if shape.trained_head_norms and twinned:
            total += (4 if shape.wide_head_norms else c) * (q + kv)
    total += c * (2.0 * q + kv + shape.values)
    if work.attention == "dense":
        total += (c + 4 * shape.softcap) * heads * (work.read_rows + work.block_size)
    else:
        total += 4.0 * heads
    if shape.experts is None:
        return total + 3.0 * c * shape.mlp
    every, chosen = shape.experts
    return total + chosen * (c * (3.0 * shape.mlp + shape.hidden + 1) + 32) + 4.0 * every


def activation_bytes(shape: Shape, work: Work) -> float:
    """Bytes that live from the forward pass to the backward pass, of B sequences of T tokens with N blocks each.

    Q (sum of `layer_bytes` over the layers from the first that learns + 4 C + 4 of the last norm
        + 2 D c of each kind of rotary table, D being the head's size)
    c C + 22 for each target (its gradient, its places), and of a repair head of rank r
        c (2 C + 2 r), and 4 C + 4 where the twins learn as well,
    the AR pass beside it: L B T c (kv + v) of keys and values, c B T C of hidden states; with flex the keys and values
    of each layer that learns once more, and those of the block rows: 2 c kv (B T + Q); dense: masks of Q T
    numbers, twice with windows.
    Recomputed: of the layers that learn only the largest, and c C Q for the input of each.
    """
    c, rows, learning = work.dtype_bytes, work.block_rows, shape.learning_layers
    context_rows = work.micro_batch_size * work.sequence_length
    total = float(c * context_rows) * (shape.num_layers * (shape.keys + shape.values) + shape.hidden)
    if work.attention == "dense":
        total += (1 + shape.windowed) * c * rows * work.sequence_length
    total += work.target_rows * (c * shape.hidden + 22.0)
    if shape.repair_rank:
        repaired = c * (2.0 * shape.hidden + 2 * shape.repair_rank)
        total += work.target_rows * (repaired + (4 * shape.hidden + 4) * bool(learning))
    if learning:
        sizes = [layer_bytes(shape, work, layer) for layer in learning]
        if work.recomputed:
            sizes = [max(sizes), *[c * shape.hidden] * len(learning)]
        total += rows * sum(sizes)
        total += rows * (4.0 * shape.hidden + 4 + 2 * shape.rope_tables * shape.head_dim * c)
        if work.attention == "flex":
            together = 1 if work.recomputed else len(learning)
            total += together * 2.0 * c * shape.keys * (context_rows + rows)
    return total


def logits_bytes(shape: Shape, work: Work) -> int:
    """The vocabulary rows of one chunk of the loss: min(512, targets) V (28 + 3 c, + 4 in bfloat16, + c where
    logits are capped) bytes.

    Each logit needs seven float32 numbers: the AR view's log probabilities and the same by draft row, both
    distributions, the draft's best, their difference and its product. To these come the draft's logits in float32 and
    as the head gives them, and the gradients of the chunk before, in parts and in one.
    """
    c = work.dtype_bytes
    each = 28 + (3 + shape.capped_logits) * c + 4 * (c != BYTES["float32"])
    return round(min(CHUNK, work.target_rows) * shape.vocab * each)


def memory(
    shape: Shape, work: Work, *, processes: int = 1, sharded: bool = False, averaged: bool = False
) -> Memory:
    """Memory of one process at the peak of a step, P being the base's, W the view's, G the trained parameters.

    base c P; view 4 W, and 2 G of the copies that bfloat16 works with (with shards, of two layers alone)
    gradients 4 G, twice with DDP (its buckets); AdamW 8 G, and 4 G more of the weights' mean where it is kept
    activations as `activation_bytes`, logits as `logits_bytes`
    workspace 1 GB + Q (3 c I + 12 C) of one layer's backward pass + 5 % of all that for memory in pieces
    With shards, of all weights, gradients and optimizer tensors one part for each process, and whole: what lies
    outside the layers, and two layers (one at work, one on its way).
    """
    c, share = work.dtype_bytes, processes if sharded else 1
    base = c * shape.parameters / share
    view = 4 * shape.view_parameters / share
    gradients = 4 * shape.trained_parameters / share
    optimizer = kept_bytes(averaged=averaged) * shape.trained_parameters / share
    if sharded:
        base += c * (shape.root_parameters + 2 * shape.layer_parameters)
        view += 2 * c * shape.view_layer_parameters
        # In the dtype of the pass, and in float32 for the sum.
        gradients += 2 * (c + 4 * (c != BYTES["float32"])) * shape.view_layer_parameters
    else:
        view += _cast_bytes(c) * shape.trained_parameters
        gradients *= 1 + (processes > 1)
    activations, logits = activation_bytes(shape, work), logits_bytes(shape, work)
    backward = work.block_rows * (3 * c * shape.mlp * _chosen(shape) + 12 * shape.hidden)
    known = base + view + gradients + optimizer + activations + logits + backward
    return Memory(
        base_weights=round(base),
        view_weights=round(view),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=round(activations),
        logits=logits,
        workspace=round(_FIXED_BYTES + backward + _FRAGMENTED * known),
    )


def gathered_bytes(shape: Shape, work: Work, *, processes: int, averaged: bool = False) -> int:
    """Memory of one process of a sharded run while it holds all weights: during evaluations and at its end.

    c P + 4 W, c W more for the copy in bfloat16, the optimizer's share 8 G / n (12 with a mean), and the workspace's
    1 GB.
    """
    c = work.dtype_bytes
    whole = c * shape.parameters + (4 + _cast_bytes(c)) * shape.view_parameters
    kept = kept_bytes(averaged=averaged) * shape.trained_parameters
    return round(whole + kept / processes + _FIXED_BYTES)


def _cast_bytes(dtype_bytes: int) -> int:
    """Bytes of the cast copy of each weight of the view, which passes in bfloat16 use beside the float32 one."""
    return dtype_bytes if dtype_bytes == BYTES["bfloat16"] else 0


def kept_bytes(*, averaged: bool) -> int:
    """Bytes for each trained parameter beside itself and its gradient: AdamW's moments, and its mean if one is kept."""
    return 12 if averaged else 8


def pass_flops(shape: Shape, work: Work) -> float:
    """Operations of the matrix products of one pass of one process, 2 for each multiplication and addition.

    M: weights that a row meets in a layer, m of them trained (in place of the base's; low-rank parts besides).
    AR rows, B T of them: L (2 M + 4 T q); target distributions: 2 V C each, for min(B T, targets) rows
    block rows, Q: forward L (2 M + 4 q (S + K)); backward, in the layers that learn, 2 M to their inputs, 2 m to their
        weights, and attention's 4 q S + 8 q K (flex: 10 q (S + K), since it computes scores again and gradients
        of all keys); less 2 C (q + 2 kv) in the first of them, unless a trained mask learns
    targets: 2 V C there, 2 V C back; a repair head 2 R there, 4 R back
    blocks that are probed and moved: their share of the forward pass and of the targets once more
    recomputed: the forward pass of the layers that learn once more, without the MLP's last product where no norm
        follows it
    """
    q, layers, learning = shape.queries, shape.num_layers, len(shape.learning_layers)
    twins = len(shape.twin_layers)
    # Full twins replace the base's weights.
    more = shape.view_weights * twins if shape.low_rank else 0
    context_rows = work.micro_batch_size * work.sequence_length
    teacher = context_rows * layers * (2 * shape.layer_weights + 4 * work.sequence_length * q)
    reach = work.read_rows + work.block_size
    forward = work.block_rows * (layers * (2 * shape.layer_weights + 4 * q * reach) + 2 * more)
    attention = 10 * q * reach if work.attention == "flex" else q * (4 * work.read_rows + 8 * work.block_size)
    backward = work.block_rows * (
        learning * (2 * shape.layer_weights + attention)
        + (2 * more + 2 * shape.view_weights * twins) * bool(learning)
    )
    if learning and not shape.trained_mask:
        backward -= work.block_rows * 2 * shape.hidden * (q + 2 * shape.keys)
    if work.recomputed:
        followed = shape.experts is not None or not shape.pre_norm or shape.hidden_norms > _NORMS_BEFORE
        unneeded = 0 if followed else 2 * shape.mlp * shape.hidden
        again = 2 * shape.layer_weights + 4 * q * reach - unneeded
        backward += work.block_rows * (learning * again + 2 * more * bool(learning))
    head = 2.0 * shape.vocab * shape.hidden
    loss = (
        head * (work.teacher_rows + 2 * work.target_rows) + 6.0 * shape.repair_parameters * work.target_rows
    )
    probing = work.rejected_share * (forward + head * work.target_rows)
    return teacher + forward + backward + loss + probing


def hours(flops: float, *, peak: float, utilisation: float, processes: int) -> float:
    """Hours of that many operations on as many devices of that peak (operations a second)."""
    return flops / (peak * utilisation * processes) / 3600


def _chosen(shape: Shape) -> int:
    return 1 if shape.experts is None else shape.experts[1]
