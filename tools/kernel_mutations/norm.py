"""Bugs in the norms and in what they share with others."""
from __future__ import annotations

from functools import partial

from megalm.tools.kernel_mutations.mutation import Mutation

_bug = partial(Mutation, "norm")
_FORWARD, _BACKWARD, _REDUCE, _COLUMNS, _ROWS = (
    "norm_forward.cu", "norm_backward.cu", "common/reduce.cuh", "common/columns.cuh", "common/rows.cuh")

MUTATIONS = (
    _bug("no barrier before a block's reduction writes what the last one still reads", _REDUCE,
         "  __syncthreads();  // the last reduction's partial results have been read\n", ""),
    _bug("no barrier between the warps' partial sums and their sum", _REDUCE,
         "  if (lane == 0) partial[warp] = value;\n  __syncthreads();\n  return reduce_lanes",
         "  if (lane == 0) partial[warp] = value;\n  return reduce_lanes"),
    _bug("a sum over half of the lanes", _REDUCE, "for (int distance = width / 2; distance > 0; distance /= 2) value",
         "for (int distance = width / 4; distance > 0; distance /= 2) value"),
    _bug("a sum over all warps but the last", _REDUCE, "reduce_lanes<Op>(lane < warps ?", "reduce_lanes<Op>(lane < warps - 1 ?"),
    _bug("the second of two sums takes the first's partial results", _REDUCE,
         "return {reduce_lanes<Sum>(value.first, WARP), reduce_lanes<Sum>(value.second, WARP)};",
         "return {reduce_lanes<Sum>(value.first, WARP), reduce_lanes<Sum>(value.first, WARP)};"),
    _bug("an unguarded load of a row's tail", _FORWARD,
         "      if (!here || column >= width) continue;\n      packs[p]", "      if (!here) continue;\n      packs[p]"),
    _bug("lanes beyond the row count in the variance", _FORWARD, "if (inside) squares +=", "squares +="),
    _bug("no eps", _FORWARD, "reduce_row<Sum>(squares) * scale + eps", "reduce_row<Sum>(squares) * scale"),
    _bug("the sum is stored without the residual", _FORWARD,
         "for (int i = 0; i < VEC; i++) values[p][i] = packs[p][i] + others[p][i];",
         "for (int i = 0; i < VEC; i++) values[p][i] = packs[p][i];"),
    _bug("the bias is scaled too", _FORWARD, "values[p][i] = values[p][i] * rstd * gain[i] + shift[i]",
         "values[p][i] = (values[p][i] + shift[i]) * rstd * gain[i]"),
    _bug("long rows start the second pass from x, not from the sum", _FORWARD,
         "  if (residual != nullptr) from = sum + row * width;  // a thread reads what it wrote itself\n", ""),
    _bug("the mean of rms_norm is subtracted", _FORWARD, "layer_norm ? reduce_row<Sum>(total) * scale : C(0)",
         "reduce_row<Sum>(total) * scale"),
    _bug("the gradient's level has the wrong sign", _BACKWARD, "- along * xhat - level) + others",
         "- along * xhat + level) + others"),
    _bug("the next row is that of the next block only", _BACKWARD, "next.fetch(a, row + stride);",
         "next.fetch(a, row + gridDim.x);"),
    _bug("the bias's partial sums overwrite the weight's", _BACKWARD, "(int64_t(which) * gridDim.x + blockIdx.x) * a.width;",
         "int64_t(blockIdx.x) * a.width;"),
    _bug("no barrier before the rows of a block are added up", _BACKWARD,
         "    if (blockDim.y == 1) continue;\n    __syncthreads();\n", "    if (blockDim.y == 1) continue;\n"),
    _bug("weight and bias gradients swapped", _BACKWARD, "mine[column + i] = which == 0 ? weight_sums",
         "mine[column + i] = which == 1 ? weight_sums"),
    _bug("what reaches the sum on its other way is lost for short rows", _BACKWARD,
         "if (EARLY && inside && a.grad_sum != nullptr)", "if (false)"),
    _bug("tiles of long rows skip every second group of rows", _BACKWARD, "row += gridDim.y * TILE_ROWS) {",
         "row += 2 * gridDim.y * TILE_ROWS) {"),
    _bug("a tile's columns are not guarded", _BACKWARD, "if (mine < a.width) a.partial", "a.partial"),
    _bug("the sum over blocks leaves out the first", _COLUMNS, "block = threadIdx.y; block", "block = threadIdx.y + 1; block"),
    _bug("no barrier before the sum over blocks ends", _COLUMNS, "= sum;\n  __syncthreads();\n", "= sum;\n"),
    _bug("rows inside a projection take the wrong stride", _ROWS, "(row % inner) * inner_stride", "(row % inner) * outer_stride"),
)
