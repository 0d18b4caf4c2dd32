"""Bugs in attention, forward and backward."""
from __future__ import annotations

from functools import partial

from megalm.tools.kernel_mutations.mutation import Mutation

_bug = partial(Mutation, "attention")
_COMMON, _FORWARD, _BACKWARD = "attention_common.cuh", "attention_forward.cuh", "attention_backward.cuh"

MUTATIONS = (
    _bug("causal one key too far", _COMMON, "int64_t(i) + keys - queries + right + 1;",
         "int64_t(i) + keys - queries + right + 2;"),
    _bug("causal aligned at the top left", _COMMON, "int64_t(i) + keys - queries + right + 1;", "int64_t(i) + right + 1;"),
    _bug("a window one key too wide", _COMMON, "int64_t(i) + keys - queries - left;", "int64_t(i) + keys - queries - left - 1;"),
    _bug("a document's end is ignored", _COMMON, "if (last != nullptr) high = min(high, int64_t(last[i]));", ""),
    _bug("ALiBi without the distance", _COMMON, "return x + slope * distance;", "return x + slope;"),
    _bug("a softcap that is not undone", _COMMON, "if (capped) x = softcap * tangent(x);", "if (capped) x = tangent(x);"),
    _bug("a sample's dropout mask for all heads", _COMMON, "(p.head_first + head) * p.queries * p.keys",
         "p.head_first * p.queries * p.keys"),
    _bug("neighbouring words of a block swapped", _COMMON, "(uint32_t(both[0]) | uint32_t(both[1]) << 1)",
         "(uint32_t(both[1]) | uint32_t(both[0]) << 1)"),
    _bug("a swizzle that writes and reads differently", _COMMON,
         "load_matrices_transposed(b, tile + at(row + lane % 16, 2 * pair + lane / 16));",
         "load_matrices_transposed(b, tile + at(row + lane % 16, 2 * pair + 1 - lane / 16));"),
    _bug("rows beyond the tensor are read", _COMMON, "const bool valid = first + row < rows;", "const bool valid = true;"),
    _bug("a fragment of the wrong rows", _COMMON, "load_matrices(a, tile + at(row + lane % 16, 2 * step + lane / 16));",
         "load_matrices(a, tile + at(row + lane % 8, 2 * step + lane / 16));"),
    _bug("the maximum over half of a row's lanes", _COMMON, "  return op(value, __shfl_xor_sync(ALL_LANES, value, 2));",
         "  return value;"),
    _bug("the output is not scaled to a new maximum", _FORWARD, "out[s][n][i] *= rescale;", "out[s][n][i] *= 1.0f;"),
    _bug("the sum is not scaled to a new maximum", _FORWARD, "total[s][half] * rescale + sum;", "total[s][half] + sum;"),
    _bug("keys are not waited for", _FORWARD, "    copy_wait<1>();   // this tile's keys",
         "    copy_wait<3>();   // this tile's keys"),
    _bug("values are not waited for", _FORWARD,
         "    copy_wait<1>();\n    __syncthreads();\n    if (key + KEYS < end) fetch_values",
         "    copy_wait<2>();\n    __syncthreads();\n    if (key + KEYS < end) fetch_values"),
    _bug("no barrier before the next keys overwrite a tile", _FORWARD,
         "    __syncthreads();  // for all threads, and all have left the tile before\n", ""),
    _bug("a head reads the next group's keys", _FORWARD, "group = head / int(p.heads / p.groups), last_query",
         "group = head % int(p.groups), last_query"),
    _bug("a tile that some don't see in full goes unmasked", _FORWARD, "key >= all_begin && key + KEYS <= all_end",
         "key >= all_begin && key + KEYS <= end + KEYS"),
    _bug("a sink that only moves the maximum", _FORWARD, "sum = sum * factor + power_of_two(sink - top);", "sum = sum * factor;"),
    _bug("lse in units of two", _FORWARD, "(largest + log2f(sum)) * LN2", "(largest + log2f(sum))"),
    _bug("kept probabilities are not scaled", _FORWARD, "factor / sum * kept", "factor / sum"),
    _bug("a block's own keys are in no group", _BACKWARD,
         "  copy_commit();  // in a group of their own: where no tile follows, the last wait must cover them all the same\n", ""),
    _bug("a block's own queries are in no group", _BACKWARD, "  copy_commit();  // as above\n", ""),
    _bug("delta is not subtracted", _BACKWARD, "p * (grads[0][n][i] - query_delta) * slope", "p * grads[0][n][i] * slope"),
    _bug("the slope of the softcap is forgotten", _BACKWARD, "slope = 1.0f - share * share;", "slope = 1.0f;"),
    _bug("dropout is missing from the gradient of the probabilities", _BACKWARD,
         "    drop<TILE / 8>(grads[0], bits, sides.dropped.kept);\n", ""),
    _bug("the gradient of keys covers the first head of a group only", _BACKWARD, "total = tiles * each;", "total = tiles;"),
    _bug("the gradient of queries is not accumulated", _BACKWARD,
         "    weights_by_rows<D, TILE>(grad_q, slopes, keys + buffer * S::OTHER_D);",
         "    for (auto &n : grad_q[0]) for (float &x : n) x = 0.0f;\n"
         "    weights_by_rows<D, TILE>(grad_q, slopes, keys + buffer * S::OTHER_D);"),
    _bug("gradients without the scale", _BACKWARD, "keep<D>(queries, grad_q[0], own_row, float(p.scale), float(p.scale));",
         "keep<D>(queries, grad_q[0], own_row, 1.0f, 1.0f);"),
    _bug("the first queries that see a key are skipped", _BACKWARD, "return visible.end(i) > first_key; })",
         "return visible.end(i) > last_key; })"),
    _bug("the last queries that see a key are skipped", _BACKWARD, "return visible.begin(i) > last_key; })",
         "return visible.begin(i) > first_key; })"),
    _bug("delta of half a row", "attention_delta.cu", "reduce_lanes<Sum>(sum, lanes);", "reduce_lanes<Sum>(sum, lanes / 2);"),
)
