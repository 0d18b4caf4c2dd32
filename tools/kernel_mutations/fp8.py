"""Bugs in attention in fp8: units of heads, the order of bytes, what was lifted, and rows beyond the last."""
from __future__ import annotations

from functools import partial

from megalm.tools.kernel_mutations.mutation import Mutation

_bug = partial(Mutation, "attention fp8")
_QUANTIZE, _LAYOUT = "attention_hopper_quantize.cu", "attention_hopper_quantize.cuh"
_FORWARD, _SHARED = "attention_hopper_forward.cuh", "attention_hopper.cuh"

MUTATIONS = (
    _bug("the keys' unit of another group", _FORWARD, "* units.key(work.batch, group) :", "* units.key(work.batch, 0) :"),
    _bug("the keys' unit forgotten", _FORWARD, " * units.key(work.batch, group) :", " :"),
    _bug("the queries' unit of a group, not a head", _FORWARD, "units.query(work.batch, work.head)",
         "units.query(work.batch, group)"),
    _bug("the values' unit of the keys", _FORWARD, "BYTES ? units.value(work.batch, group)",
         "BYTES ? units.key(work.batch, group)"),
    _bug("weights stay lifted in the sums", _FORWARD, "maximum[half] * unit - LIFT, factor", "maximum[half] * unit, factor"),
    _bug("weights not lifted", _FORWARD, "LIFT = BYTES ? 8.0f : 0.0f;", "LIFT = BYTES ? -2.0f : 0.0f;"),
    _bug("bytes of weights in another order", _SHARED, "four_bits(left[0], left[1], right[0], right[1])",
         "four_bits(left[0], right[0], left[1], right[1])"),
    _bug("values in the order of their keys", _LAYOUT, "return place % 4 / 2 * 8 + place / 4 * 2 + place % 2;", "return place;"),
    _bug("a unit of the first rows alone", _QUANTIZE, "i < bytes.chunks; i += THREADS)", "i < 1; i += THREADS)"),
    _bug("a unit that is too small", _QUANTIZE, "(fraction <= MOST / 512.0f ? 9 : 8)", "9"),
    _bug("values beyond the last key", _QUANTIZE, "key < part.rows ? part.pack(key, chunk) : Pack<T, 8>{};",
         "part.pack(key, chunk);"),
    _bug("products of a tile onto those of the one before", _SHARED, "registers<false, Order::along>(out, weights[step], b);",
         "registers<true, Order::along>(out, weights[step], b);"),
    _bug("the first slice of values for every one", _FORWARD, "values + slice * SLICE * PANEL_ROW", "values"),
    _bug("products of every slice onto the first", _FORWARD, "out[slice * SLICE / 8 + n][i] +=", "out[n][i] +="),
    _bug("the second half of sixteen forgotten", _QUANTIZE, "part.pack(row, 2 * chunk + half)", "part.pack(row, 2 * chunk)"),
)
