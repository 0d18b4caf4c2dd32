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
    _bug("scores used before their products are done", _FORWARD,
         "        matrix_wait<BESIDE ? 1 : 0>();\n        matrix_settle(f.scores);\n", "        matrix_wait<2>();\n"),
    _bug("a stage of keys left while its products run", _FORWARD,
         "        matrix_wait<BESIDE ? 1 : 0>();\n        matrix_settle(f.scores);\n"
         "        warp_arrive(shared.keys_left(place.stage));\n",
         "        warp_arrive(shared.keys_left(place.stage));\n"
         "        matrix_wait<BESIDE ? 1 : 0>();\n        matrix_settle(f.scores);\n"),
    _bug("weights overwritten while their products run", _FORWARD,
         "        if constexpr (BESIDE) {\n          f.finish_output(0);\n"
         "          warp_arrive(shared.values_left(before.stage));\n        }\n        f.scale_output();\n"
         "        as_weights<In>(f.weights, f.scores);\n",
         "        as_weights<In>(f.weights, f.scores);\n        if constexpr (BESIDE) {\n          f.finish_output(0);\n"
         "          warp_arrive(shared.values_left(before.stage));\n        }\n        f.scale_output();\n"),
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
    _bug("gradients waited for with the wrong parity", _BACKWARD, "GRADS_HERE + place.stage, place.parity);",
         "GRADS_HERE + place.stage, place.parity ^ 1);"),
    _bug("slopes stored without the swizzle", _BACKWARD, "chunk = (n % 8) ^ (key & 7);", "chunk = n % 8;"),
    _bug("operands of another swizzle", _MATRIX, "uint64_t(1) << 62;", "uint64_t(2) << 62;"),
    _bug("values brought to the other stage", _FORWARD, "unsigned char *const to = shared.values + place.stage * VALUE_BYTES;",
         "unsigned char *const to = shared.values + (1 - place.stage) * VALUE_BYTES;"),
    _bug("slopes stored without a fence", _BACKWARD, "      fence_async();\n", ""),
    _bug("half of the bytes of keys and values expected", _BACKWARD, "barrier_expect(here, 2 * OWN_BYTES);",
         "barrier_expect(here, OWN_BYTES);"),
    _bug("a stage of keys left when one warpgroup has", _FORWARD, "barrier_start(keys_left(stage), 4 * CONSUMERS);",
         "barrier_start(keys_left(stage), 4);"),
    _bug("the queries' gradient added while its products run", _BACKWARD,
         "      matrix_wait<0>();\n      matrix_settle(grad_q);\n", "      matrix_wait<1>();\n"),
    _bug("lse of powers of two", _FORWARD, "(largest + log2f(sum)) * LN2", "(largest + log2f(sum))"),
    _bug("the keys' gradient is not scaled", _BACKWARD, "f.grad_k, float(p.scale));", "f.grad_k, 1.0f);"),
    _bug("a softcap bends delta too", _BACKWARD, "(1.0f - share * share) + delta;", "(1.0f - share * share);"),
    _bug("the warp that loads leaves a turn early", _BACKWARD,
         "turn < work.turns(); turn++) {\n      const Place<STAGES> place(turn);\n      const int head",
         "turn < work.turns() - 1; turn++) {\n      const Place<STAGES> place(turn);\n      const int head"),
    _bug("slopes read before both warpgroups stored theirs", _BACKWARD, "      named_wait(SLOPES, CONSUMERS * WARPGROUP);\n", ""),
)
