"""Bugs in attention on Hopper: phases of barriers, the copy engine, matrix instructions in the background, turns, tiles."""
from __future__ import annotations

from functools import partial

from megalm.tools.kernel_mutations.mutation import Mutation

_bug = partial(Mutation, "attention hopper")
_MATRIX = "common/wgmma.cuh"
_FORWARD, _BACKWARD = "attention_hopper_forward.cuh", "attention_hopper_backward.cuh"
_SUMS = "attention_hopper_sums.cuh"

MUTATIONS = (
    _bug("keys waited for with the wrong parity", _FORWARD, "barrier_wait(shared.keys_here(place.stage), place.parity);",
         "barrier_wait(shared.keys_here(place.stage), place.parity ^ 1);"),
    _bug("values not waited for", _FORWARD, "    barrier_wait(shared.values_here(place.stage), place.parity);\n", ""),
    _bug("scores used before their products are done", _FORWARD, "        matrix_wait<1>();\n        matrix_settle(f.scores);\n",
         "        matrix_wait<2>();\n"),
    _bug("a stage of keys left while its products run", _FORWARD,
         "        matrix_wait<1>();\n        matrix_settle(f.scores);\n        warp_arrive(shared.keys_left(place.stage));\n",
         "        warp_arrive(shared.keys_left(place.stage));\n        matrix_wait<1>();\n        matrix_settle(f.scores);\n"),
    _bug("weights overwritten while their products run", _FORWARD,
         "        f.exponentiate(scored.unit);\n        matrix_wait<0>();\n        matrix_settle(f.out);\n"
         "        warp_arrive(shared.values_left(before.stage));\n        f.scale_output();\n"
         "        as_weights<T>(f.weights, f.scores);\n",
         "        f.exponentiate(scored.unit);\n        as_weights<T>(f.weights, f.scores);\n        matrix_wait<0>();\n"
         "        matrix_settle(f.out);\n        warp_arrive(shared.values_left(before.stage));\n        f.scale_output();\n"),
    _bug("queries left before the last scores", _FORWARD, "      barrier_wait(shared.barriers + QUERIES_HERE, done++ % 2);\n",
         "      barrier_wait(shared.barriers + QUERIES_HERE, done++ % 2);\n      warp_arrive(shared.barriers + QUERIES_LEFT);\n"),
    _bug("a turn passed to oneself", _FORWARD, "named_arrive(1 + (consumer() + 1) % CONSUMERS,", "named_arrive(1 + consumer(),"),
    _bug("one key beyond the diagonal", _FORWARD, "key >= end[i / 2]) scores", "key > end[i / 2]) scores"),
    _bug("the output is not scaled to a new maximum", _FORWARD, "        f.scale_output();\n", ""),
    _bug("eight rows half as far apart", _MATRIX, "return operand(start, 16, SWIZZLE_BYTES);",
         "return operand(start, 16, SWIZZLE_BYTES / 2);"),
    _bug("gradients used, and queries left, while their products run", _BACKWARD,
         "      matrix_wait<1>();\n      matrix_settle(f.grad_v);\n      matrix_settle(f.grad_k);\n",
         "      matrix_wait<3>();\n"),
    _bug("facts of a tile not waited for", _BACKWARD, "QUERIES_HERE + stage, 1 + WARP);", "QUERIES_HERE + stage, 1);"),
    _bug("turns counted from the first keys", _BACKWARD, "- 1) / KEYS - work.block);", "- 1) / KEYS - work.block + 1);"),
    _bug("a turn that is not passed", _BACKWARD, "      if (thread == 0) turn_pass(now);\n", ""),
    _bug("sums in no order leave some out", _BACKWARD, "add_to(to + Sums::place(n, thread), grad_q[n]);",
         "if (p.deterministic || n < 7) add_to(to + Sums::place(n, thread), grad_q[n]);"),
    _bug("blocks whose turn is last begin first", _BACKWARD, "block = last_first ? blocks - 1 - rest / here : rest / here;",
         "block = last_first ? rest / here : blocks - 1 - rest / here;"),
    _bug("more registers than there are", _BACKWARD, "MULTIPLIES = QUERIES == 64 ? 240 : 232;", "MULTIPLIES = 240;"),
    _bug("sums read from the other warpgroup's half", _SUMS, "row / 64 + chunk / 8) * SHARE",
         "row / 64 + 1 - chunk / 8) * SHARE"),
)
