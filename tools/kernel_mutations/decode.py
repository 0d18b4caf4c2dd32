"""Bugs in attention to a cache."""
from __future__ import annotations

from functools import partial

from megalm.tools.kernel_mutations.mutation import Mutation

_bug = partial(Mutation, "decode")
_KERNEL, _MERGE = "attention_decode.cuh", "attention_decode.cu"

MUTATIONS = (
    _bug("a query sees the key after it", _KERNEL, "return max(offset + query + 1, 0);", "return max(offset + query + 2, 0);"),
    _bug("the window is one key too wide", _KERNEL, "int(max(int64_t(offset) + query - left, int64_t(0)))",
         "int(max(int64_t(offset) + query - left - 1, int64_t(0)))"),
    _bug("all sequences are as long as the first", _KERNEL, "((const int32_t *)p.lengths)[batch]",
         "((const int32_t *)p.lengths)[0]"),
    _bug("queries are counted from a sequence's start", _KERNEL, "const Interval seen{length - int(p.queries), p.left};",
         "const Interval seen{0, p.left};"),
    _bug("a split begins a tile late", _KERNEL, "const int start = first_tile + split * share,",
         "const int start = first_tile + split * share + (split > 0),"),
    _bug("what is left over by the division into splits is lost", _KERNEL, "ceil_div(ceil_div(tiles, F::WARPS), splits)",
         "(ceil_div(tiles, F::WARPS) / splits)"),
    _bug("warps share tiles", _KERNEL, "return first + index * F::WARPS;", "return first + index;"),
    _bug("a page too far", _KERNEL, "table[tile(index) * F::KEYS >> page_shift]",
         "table[(tile(index) + 1) * F::KEYS >> page_shift]"),
    _bug("the place within a page is the place in the sequence", _KERNEL, "inner = key & page_mask;", "inner = key;"),
    _bug("the table of the first sequence for all", _KERNEL, "p.table + batch * (p.keys >> page_shift)", "p.table"),
    _bug("a head reads another group's keys", _KERNEL, "+ 8 * half, head = group * each + row % each;",
         "+ 8 * half, head = row % each * int(p.groups) + group;"),
    _bug("keys beyond a length are read", _KERNEL, "const bool valid = key + row >= low && key + row < high;",
         "const bool valid = true;"),
    _bug("keys before a window are read", _KERNEL, "const bool valid = key + row >= low && key + row < high;",
         "const bool valid = key + row < high;"),
    _bug("a tile is not waited for", _KERNEL, "copy_wait<F::STAGES - 2>();", "copy_wait<F::STAGES - 1>();"),
    _bug("warps write over each other's tiles", _KERNEL, "  __syncthreads();  // every warp has left its tiles\n", ""),
    _bug("warps are put together without their maxima", _KERNEL, "const float factor = RowSums::factor(tops[at], sums.top);",
         "const float factor = 1.0f;"),
    _bug("the second half of the rows is lost", _KERNEL, "const int own_rows = min(F::ROWS, rows - first_row);",
         "const int own_rows = min(F::ROWS / 2, rows - first_row);"),
    _bug("a slope of another row's head", _KERNEL, "(const float *)p.slopes, here ? head : 0);",
         "(const float *)p.slopes, group * each);"),
    _bug("splits are merged without their sums", _MERGE, "weight = RowSums::factor(mine, top);",
         "weight = mine == -INFINITY ? 0.0f : 1.0f;"),
    _bug("empty splits are read", _MERGE, "      if (weights[split] == 0.0f) continue;  // an empty part: nobody wrote it\n", ""),
    _bug("the merge takes the first parts only", _MERGE, "split += parts) {", "split += splits) {"),
    _bug("the merge forgets the sink", _MERGE, "  total.add(p.sinks, head);\n", ""),
    _bug("every split adds the sink", _KERNEL, "if (whole) sums.add(p.sinks, head);", "sums.add(p.sinks, head);"),
    _bug("a split's lse in natural units", _KERNEL, "((float *)p.partial_lse)[part] = sums.lse();",
         "((float *)p.partial_lse)[part] = sums.lse() * LN2;"),
)
