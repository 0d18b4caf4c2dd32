"""The proof notices when a mechanism is missing: each one taken away fails, where and as it should; put back, it passes."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from tests.parity.cases import Case
from tests.parity.check import problems_of

STEPS = 3

TWO_STAGES = Case("gpt2", pp=2, optimizer="sgd")
REPLICAS = Case("llama", dp=2, optimizer="sgd")
TP = Case("gpt2", tp=2, optimizer="sgd")
TP_SP = Case("gpt2", tp=2, sp=True, optimizer="sgd")
TP_PP_SP = Case("llama", tp=2, pp=2, sp=True, optimizer="sgd")
SHARED_KEYS = Case("llama", tp=2, optimizer="sgd", model=(("num_query_groups", 1),))
PLAIN = Case("llama", tp=2, optimizer="sgd", zero_stage=0)
HALF = Case("llama", pp=2, optimizer="sgd", dtype="bf16")
RECOMPUTE_FULL = replace(TWO_STAGES, recompute="full", micro=1)
RECOMPUTE_SELECTIVE = replace(TWO_STAGES, recompute="selective", micro=1)

# mechanism, case, what the comparison must say. A loss alone sees neither a forgotten reduction nor, under Adam, a wrong clip.
TAKEN_AWAY = [
    ("partial_gradients", TP_SP, ("replicas of", "first gradient of layers.0.attention.norm.weight", "parameter of")),
    ("partial_gradients", TP_PP_SP, ("replicas of", "first gradient of layers.0.attention.norm.weight", "parameter of")),
    ("partial_gradients", SHARED_KEYS, ("replicas of", "first gradient of layers.0.attention.key.weight", "parameter of")),
    ("token_mean", REPLICAS, ("loss at step 0", "gradient norm at step 0", "first gradient of")),
    ("token_mean", TWO_STAGES, ("loss at step 0", "gradient norm at step 0", "first gradient of")),
    ("token_count", REPLICAS, ("loss at step 0", "gradient norm at step 0", "first gradient of")),
    ("tied_gradients", TWO_STAGES, ("replicas of", "first gradient of embedding.word.weight", "parameter of embedding")),
    ("tp_marks", TP, ("gradient norm at step 0", "parameter of")),
    ("tp_marks", TP_PP_SP, ("gradient norm at step 0", "parameter of")),
    ("dropout_capture", RECOMPUTE_FULL, ("first gradient of layers.0", "parameter of")),
    ("dropout_capture", RECOMPUTE_SELECTIVE, ("first gradient of layers.0", "parameter of")),
    ("clip_norm", TWO_STAGES, ("norms differ between ranks", "parameter of")),
    ("clip_norm", PLAIN, ("norms differ between ranks", "parameter of")),
    ("clipping", TWO_STAGES, ("loss at step 1", "parameter of")),
    ("clipping", PLAIN, ("loss at step 1", "parameter of")),
    ("head_gradient", HALF, ("norms:", "first gradient of head.weight", "parameters:")),
]


@functools.cache
def intact(case: Case) -> list[str]:
    return problems_of(case, steps=STEPS)


@pytest.mark.parametrize("mutation, case, expected", TAKEN_AWAY, ids=[f"{m}-{c.name}-{c.recompute}" for m, c, _ in TAKEN_AWAY])
def test_a_missing_mechanism_is_noticed(mutation: str, case: Case, expected: tuple[str, ...]) -> None:
    assert intact(case) == []
    problems = problems_of(case, mutation, STEPS)
    unseen = [text for text in expected if not any(text in problem for problem in problems)]
    assert unseen == [], problems
