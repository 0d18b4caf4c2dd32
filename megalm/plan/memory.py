"""Bytes on one rank of each stage: weights, gradients and optimizer state as DeepSpeed 0.19.8 lays them out, the rest estimated.

All ranks of a stage hold the same amount: tp divides every sharded dim, and ZeRO pads its partitions to equal size.

The optimizer's groups (with and without weight decay) are flattened one by one. ZeRO 1 and 2 and BF16_Optimizer pad each flat
group to a multiple of 2 dp elements (stage_1_and_2.py and bf16_optimizer.py, nccl_start_alignment_factor); ZeRO 3 pads each
parameter to a multiple of dp (partition_parameters.py, _padding_size). The optimizer's scalar step counts are left out.
"""
from __future__ import annotations

from dataclasses import dataclass

from megalm.config import Config

from . import parameters
from .plan import Plan

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
LOGITS_CHUNK = 1 << 24      # elements of logits the loss computes at a time (parallel/cross_entropy.py)
ZERO3_PERSISTENT = 100_000  # elements, DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay gathered


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a stage."""
    parameters: int     # elements this rank's layers hold before ZeRO splits them, a tied copy included
    weights: int        # as the model reads them, ZeRO's padding included
    gradients: int      # what is accumulated over micro-batches
    optimizer: int      # master weights and moments
    activations: int    # kept for the backward passes of all micro-batches in flight, and the recomputed layer
    working: int        # what comes and goes: half-precision gradients of one backward pass, weights ZeRO 3 has gathered, logits

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def memory(config: Config, plan: Plan) -> tuple[StageMemory, ...]:
    """One entry a stage."""
    return tuple(stage_memory(config, plan, pp) for pp in range(plan.pp))


def stage_memory(config: Config, plan: Plan, pp: int) -> StageMemory:
    """The bytes on each rank of stage `pp`."""
    sizes = parameters.parameter_sizes(parameters.stage_parts(config, plan, pp), plan.tp)
    counts = [size for size, _ in sizes.values()]
    width = WIDTH[config.precision.dtype]
    weights, gradients, master = _state_elements(plan, sizes)
    return StageMemory(
        parameters=sum(counts),
        weights=weights * width,
        gradients=gradients * (2 if config.precision.dtype == "fp16" else 4),  # bf16 accumulates in fp32
        # Without ZeRO the weights are the master.
        optimizer=master * 4 * ((plan.zero_stage > 0) + moments(config)),
        activations=activations(config, plan, pp),
        working=_working(config, plan, pp, counts))


def moments(config: Config) -> int:
    """fp32 values the optimizer keeps for each element, master weights apart."""
    return 2 if config.optimizer.name == "adamw" else int(config.optimizer.momentum > 0)


def _state_elements(plan: Plan, sizes: dict[str, tuple[int, bool]]) -> tuple[int, int, int]:
    """(weights, accumulated gradients, optimizer) in elements."""
    count = sum(size for size, _ in sizes.values())
    if plan.zero_stage == 0:
        return count, count, count
    if plan.zero_stage == 3:
        partition = sum(-(-size // plan.dp) for size, _ in sizes.values())
        return partition, partition, partition
    alignment = 2 * plan.dp
    groups = [sum(size for size, decays in sizes.values() if decays == which) for which in (True, False)]
    flat = sum(-(-group // alignment) * alignment for group in groups)
    if plan.wrapper == "BF16_Optimizer":
        return flat, flat, flat // plan.dp  # the fp32 gradient buffer is whole on every rank
    return flat, flat // plan.dp if plan.zero_stage == 2 else count, flat // plan.dp


def _working(config: Config, plan: Plan, pp: int, counts: list[int]) -> int:
    width = WIDTH[config.precision.dtype]
    total = 0
    if plan.wrapper == "BF16_Optimizer":
        total += sum(counts) * width  # the gradients of one backward pass, before they are added to the fp32 buffer
    if plan.zero_stage == 3:
        layers = [sum(part.local_size(plan.tp) for part in parameters.layer_parts(config, plan, layer))
                  for layer in plan.stage_layers(pp)]
        # the layer at work and the next one, which is fetched meanwhile
        total += (2 * max(layers) + sum(size for size in counts if size <= ZERO3_PERSISTENT)) * width
    return total


def activations(config: Config, plan: Plan, pp: int) -> int:
    """Bytes kept for backward passes on one rank of stage `pp`.

    1F1B keeps min(accumulation steps, pp - stage) micro-batches; a layer keeps what Korthikanti et al. 2022, section 4, count,
    for attention that doesn't store its scores.
    """
    layers = sum(name.startswith("layers.") for name in plan.stage_layers(pp))
    in_flight = min(plan.accumulation_steps, plan.pp - pp)
    total = in_flight * layers * layer_activations(config, plan, config.recompute.mode)
    if config.recompute.mode == "full":
        total += layer_activations(config, plan, "none")  # the layer that is being recomputed
    if pp == plan.pp - 1:
        total += head_activations(config, plan)
    return total


def layer_activations(config: Config, plan: Plan, recompute: str) -> int:
    """Bytes one transformer layer keeps for one micro-batch."""
    model, width, tp = config.model, WIDTH[config.precision.dtype], plan.tp
    tokens = model.seq_length * plan.micro_batch
    stream = tokens // tp if plan.sequence_parallel else tokens     # positions of the residual stream on this rank
    boundary = stream * model.hidden_size * width                   # [s/tp or s, b, h]
    if recompute == "full":
        return boundary
    groups = max(1, model.num_query_groups // tp)
    query = tokens * model.num_attention_heads * model.head_dim // tp * width
    key_value = 2 * tokens * groups * model.head_dim * width
    total = 4 * boundary                                            # inputs and outputs of both norms
    total += query + key_value                                      # queries, keys and values after positions and QK norms
    total += query                                                  # context, the projection's input
    total += (3 if model.activation == "swiglu" else 2) * tokens * model.ffn_hidden_size // tp * width
    if model.dropout > 0:
        total += 2 * stream * model.hidden_size                     # masks of a byte, after attention and MLP
    if recompute == "none":
        total += _attention_core(config, plan)
    return total


def _attention_core(config: Config, plan: Plan) -> int:
    """Bytes between queries, keys, values and context: the log-sum-exp; the scores too where they are stored."""
    model, heads = config.model, config.model.num_attention_heads // plan.tp
    rows = plan.micro_batch * heads * model.seq_length
    total = rows * 4
    if plan.backends["attention"] == "reference" or model.attention_dropout > 0:
        total += rows * model.seq_length * (2 * WIDTH[config.precision.dtype] + (1 if model.attention_dropout > 0 else 0))
    return total


def head_activations(config: Config, plan: Plan) -> int:
    """Bytes of final norm and loss: the norm's input and output, a chunk of this rank's logits in fp32 with its gradient, and the
    gradients of the hidden states and of the projection, which the loss makes in its forward pass."""
    model, width = config.model, WIDTH[config.precision.dtype]
    tokens = model.seq_length * plan.micro_batch
    stream = tokens // plan.tp if plan.sequence_parallel else tokens
    chunk = min(tokens, max(1, LOGITS_CHUNK // (plan.padded_vocab_size // plan.tp)))
    vocabulary = plan.padded_vocab_size // plan.tp
    return ((2 * stream + tokens + vocabulary) * model.hidden_size) * width + 2 * chunk * vocabulary * 4
