"""Bytes of activations one rank keeps for its backward passes, estimated from what each layer saves.

The count is that of Korthikanti et al. 2022, section 4, for attention that doesn't store its scores.
"""
from __future__ import annotations

from megalm.config import Config

from .plan import Plan

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
LOGITS_CHUNK = 1 << 24  # elements of logits the loss computes at a time (parallel/cross_entropy.py)


def activations(config: Config, plan: Plan, pp: int) -> int:
    """Bytes on one rank of stage `pp`, with the min(accumulation steps, pp - stage) micro-batches that 1F1B keeps in flight."""
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
