"""The reference of the parity proof is itself right: it gives transformers' logits, and fp32 is close to fp64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from tests.config.trees import config
from tests.model import transformers_weights
from tests.parity import cases, compare, data, reference, references


@pytest.mark.parametrize("name", transformers_weights.MODELS)
def test_logits_equal_transformers(name: str) -> None:
    model, section, parts = transformers_weights.MODELS[name]()
    shape = reference.Shape.of(config(model=section).model, transformers_weights.VOCAB, transformers_weights.PADDED)
    assert {k: tuple(v.shape) for k, v in parts.items()} == reference.part_shapes(shape)
    tokens = transformers_weights.tokens()
    with torch.no_grad():
        theirs = model(tokens).logits
        ours = reference.logits(parts, tokens, shape)
    assert theirs.std() > 0.1, "the logits must differ enough for the comparison to mean something"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("style", cases.STYLES)
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_fp32_is_close_to_fp64_and_micro_batches_to_one_batch(style: str, optimizer: str) -> None:
    """The bounds of the proof leave room for serial rounding, so that a layout that misses them is wrong."""
    case = cases.Case(style, optimizer=optimizer)
    whole = references.record(case)
    for other in (references.record(replace(case, dtype="fp64")), references.record(case, micro_batch=1)):
        assert compare.scalar_problems("loss", whole.losses, other.losses, 0.1 * compare.RELATIVE) == []
        assert compare.scalar_problems("norm", whole.norms, other.norms, 0.1 * compare.RELATIVE) == []
        for what in ("first_gradients", "last_gradients", "parameters"):
            assert compare.tensor_problems(what, getattr(whole, what), getattr(other, what), 0.2 * compare.RELATIVE) == []


@pytest.mark.parametrize("case", {case.serial(): None for case in cases.CASES.values()}, ids=lambda case: case.name)
def test_clipping_is_active_and_every_gradient_stands_out(case: cases.Case) -> None:
    """The bounds mean something: every step is clipped, and each part's gradient is far larger than what its bound lets pass."""
    record = references.record(case)
    assert (
        min(norm for step, norm in enumerate(record.norms) if step != case.silent_step)
        > 2 * cases.OPTIMIZERS[case.optimizer]["clip_grad_norm"]
    )
    for gradients in (record.first_gradients, record.last_gradients):
        floor = 0.01 * compare.global_norm(gradients)
        largest = {part: g.abs().max().item() for part, g in gradients.items()}
        hidden = {part: g for part, g in largest.items() if g < 300 * compare.RELATIVE * (g + floor)}
        # What adds the same to all keys adds the same to all scores of a query: its gradient is zero in exact arithmetic.
        assert {part for part in hidden if not part.endswith(("attention.key.bias", "attention.key_norm.bias"))} == set()


def test_counted_labels_are_uneven() -> None:
    counts = [(data.global_batch(step, 256).labels != data.IGNORED).sum(1).tolist() for step in range(cases.STEPS)]
    assert all(0 in row and 32 in row for row in counts)
    assert len({tuple(row) for row in counts}) == data.GLOBAL_BATCH


def _record() -> reference.Record:
    return copy.deepcopy(references.record(cases.Case("gpt2")))


def test_a_run_equals_itself() -> None:
    assert compare.fp32_problems(_record(), _record()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    def spoil_loss(record):
        record.losses[3] = value

    def spoil_norm(record):
        record.norms[9] = value

    def spoil_gradient(record):
        record.first_gradients["layers.2.mlp.up.bias"][7] = value

    def spoil_parameter(record):
        record.parameters["embedding.word.weight"][7, 3] = value

    for spoil in (spoil_loss, spoil_norm, spoil_gradient, spoil_parameter):
        spoiled = _record()
        spoil(spoiled)
        assert len(compare.fp32_problems(spoiled, _record())) == 1
        if spoil is not spoil_norm and spoil is not spoil_loss:
            assert compare.bf16_problems(spoiled, [_record()], _record())
        else:
            assert len(compare.bf16_problems(spoiled, [_record()], _record())) == 1


def test_assembling_needs_every_element() -> None:
    full = torch.arange(12.0).view(4, 3)
    pieces = [
        compare.Piece("a", (4, 3), 1, 0, 1, 0, full[:, :1].flatten()),
        compare.Piece("a", (4, 3), 1, 1, 3, 0, full[:, 1:].flatten()[:5]),
        compare.Piece("a", (4, 3), 1, 1, 3, 5, full[:, 1:].flatten()[5:]),
    ]
    whole, missing = compare.assemble(pieces)
    assert torch.equal(whole["a"], full) and missing == []
    assert compare.assemble(pieces[:2])[1] == ["a: 3 elements held by no rank"]


def test_replicas_are_compared_by_what_they_hold() -> None:
    def result(place: tuple[int, int, int], **digests: str) -> compare.RankResult:
        return compare.RankResult(place, digests={"weight": {(name, None): digest for name, digest in digests.items()}})

    one, over_tp, over_dp, over_pp = (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)
    three = [result(one, a="x", b="y"), result(over_tp, a="x"), result(over_dp, b="y", c="z"), result(over_pp, d="w")]
    assert compare.replica_problems(three, {"weight": {"tp", "dp"}}) == []
    for axes in ({"tp"}, {"dp"}, {"tp", "dp", "pp"}, set(), None):  # each axis that the layout has, and none that it hasn't
        assert len(compare.replica_problems(three, {"weight": axes})) == 1
    assert len(compare.replica_problems([result(one, a="x", b="y"), result(over_pp, a="other", b="y")], {"weight": {"pp"}})) == 1
    assert compare.replica_problems([result(one, a="x"), result(over_tp, b="y")], {"weight": set()}) == []
    assert len(compare.replica_problems([result(one, a="x")], {"gradient": set()})) == 1
