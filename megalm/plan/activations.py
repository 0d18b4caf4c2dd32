"""Bytes of activations one rank keeps for its backward passes, estimated from what each layer saves.

The manner of counting is that of Korthikanti et al. 2022, section 4. tests/plan/test_live.py compares a layer's count to what
autograd saves.
"""
from __future__ import annotations

from megalm.config import Config

from .backends import keeps_scores, repeats_groups, sdpa_has_mask
from .plan import Plan

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
LOGITS_BYTES = 384 << 20  # of logits that the loss has at a time on a GPU
TILE = 128  # tokens that a matrix multiplication's tile holds


def activations(config: Config, plan: Plan, pp: int) -> int:
    """Bytes on one rank of stage `pp`, with the min(accumulation steps, pp - stage) micro-batches that 1F1B keeps in flight."""
    layers = sum(name.startswith("layers.") for name in plan.stage_layers(pp))
    in_flight = min(plan.accumulation_steps, plan.pp - pp)
    mode = config.recompute.mode
    total = in_flight * layers * layer_activations(config, plan, mode)
    # One layer at a time holds again what it did not keep.
    total += layer_activations(config, plan, "none") - layer_activations(config, plan, mode)
    if pp == plan.pp - 1:
        total += head_activations(config, plan)
    return total


def layer_activations(config: Config, plan: Plan, recompute: str) -> int:
    """Bytes one transformer layer keeps for one micro-batch; keyed dropout keeps no mask, norms' statistics are left out."""
    model, width, tp = config.model, WIDTH[config.precision.dtype], plan.tp
    tokens = model.seq_length * plan.micro_batch
    stream = (tokens // tp if plan.sequence_parallel else tokens) * model.hidden_size * width      # [s/tp or s, b, h]
    if recompute == "full":
        return stream
    query, key = _query_and_key(config, plan)
    # Inputs, which a parallel residual has one of, and outputs of both norms; with fewer groups than ranks, query, key and value
    # share one gathered input.
    total = (2 if model.parallel_residual else 3) * stream
    total += stream if model.num_query_groups >= tp else tokens * model.hidden_size * width
    in_place = plan.backends["rotary"] == "megalm" and model.num_query_groups >= tp
    changed = model.qk_norm or model.position_embedding == "rotary" and not in_place
    repeated = _repeated(config, plan) > 0                  # counted below; keys and values themselves are not kept then
    if not repeated or model.qk_norm or not changed:
        total += query + 2 * key                            # as projected: queries or values, or norms' inputs, keep all of it
    if changed:
        total += query + (0 if repeated else key)           # normalised or rotated
    if model.position_embedding == "rotary" and config.data.reset_positions and plan.backends["rotary"] != "megalm":
        total += 2 * 2 * tokens * model.head_dim // 2 * 4   # of query and of key, each token's row of both fp32 tables
    total += query                                          # context, the projection's input
    total += (3 if model.gated else 2) * tokens * model.ffn_hidden_size // tp * width
    again = recompute == "selective" and keeps_scores(config, plan.backends["attention"])
    return total + (0 if again else _attention_core(config, plan))


def _query_and_key(config: Config, plan: Plan) -> tuple[int, int]:
    """Bytes of this rank's queries [s, b, H/tp, d] and of its keys [s, b, G/tp, d], of one group where G < tp."""
    model, groups = config.model, max(1, config.model.num_query_groups // plan.tp)
    head = model.seq_length * plan.micro_batch * model.head_dim * WIDTH[config.precision.dtype]
    return model.num_attention_heads // plan.tp * head, groups * head


def _attention_core(config: Config, plan: Plan) -> int:
    """Bytes between queries, keys, values and context: the log-sum-exp, or the operands in the precision of the scores (where
    that is not the input's) and the probabilities, again after dropout or beside what the reference's softmax keeps."""
    model, heads = config.model, config.model.num_attention_heads // plan.tp
    rows, backend = plan.micro_batch * heads * model.seq_length, plan.backends["attention"]
    query, key = _query_and_key(config, plan)
    if not keeps_scores(config, backend):
        return rows * 4 + (_sdpa_mask(config, plan, query) if backend == "torch" else 0) + _repeated(config, plan)
    width = WIDTH[config.precision.dtype]
    scores = 4 if backend == "reference" else width
    operands = (query + 2 * key) * (scores - width) // width
    operands += key if model.qk_norm else 0  # the values once more: the norms keep the projection
    return operands + rows * model.seq_length * scores * (2 if model.attention_dropout > 0 or backend == "reference" else 1)


def _sdpa_mask(config: Config, plan: Plan, query: int) -> int:
    """Bytes that SDPA keeps for documents and a sliding window: its own context beside the one with each document's put together
    or with 0 where a query sees nothing; and, but for documents alone, its mask, [1 or b, 1, s, s] in the queries' precision."""
    documents = config.data.document_mask
    if not sdpa_has_mask(config):
        return query if documents else 0
    return query + (plan.micro_batch if documents else 1) * config.model.seq_length**2 * WIDTH[config.precision.dtype]


def _repeated(config: Config, plan: Plan) -> int:
    """Bytes of keys and values repeated for each head of their group; those of one group are only seen so."""
    groups = config.model.num_query_groups // plan.tp
    return 2 * _query_and_key(config, plan)[0] if groups > 1 and repeats_groups(config, plan.backends["attention"]) else 0


def head_activations(config: Config, plan: Plan) -> int:
    """Bytes of final norm and loss: the norm's input and output, a chunk of this rank's logits, which becomes its gradient, and
    the gradients of the hidden states and of the projection, made in the loss's forward pass, the latter summed in fp32."""
    model, width = config.model, WIDTH[config.precision.dtype]
    tokens = model.seq_length * plan.micro_batch
    stream = tokens // plan.tp if plan.sequence_parallel else tokens
    columns = plan.padded_vocab_size // plan.tp
    chunk = logits_chunk(tokens, columns, width)
    projection = width if chunk == tokens and config.precision.dtype != "fp16" else 4
    return ((2 * stream + tokens) * width + columns * projection) * model.hidden_size + chunk * columns * width


def logits_chunk(tokens: int, columns: int, width: int) -> int:
    """Tokens whose logits, `columns` of them of `width` bytes, the loss has at a time on a GPU.

    As few chunks as LOGITS_BYTES allow, because each reads and writes the whole gradient of the projection; all about as large.
    """
    most = max(1, LOGITS_BYTES // (columns * width))
    if tokens <= most:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // most))
    return min(most, -(-even // TILE) * TILE)
