"""Keyed dropout: values, gradient by the same mask, nothing stored, any slice."""

from __future__ import annotations

import pytest
import torch

from megalm.ops.dropout import bias_dropout_add, dropout
from megalm.ops.random import EMBEDDING, DropoutKey, keep_mask
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from tests.ops.dtypes import DTYPES

KEY = DropoutKey(1, 2, 3, EMBEDDING)
SAMPLES = torch.tensor([4, 9, 2])
EXTENTS = [(0, 5, 5), (0, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_values_are_zeroed_or_scaled(dtype):
    x = randn(5, 3, 8).to(dtype)
    keep = keep_mask(KEY, SAMPLES, EXTENTS, 0.3).transpose(0, 1)            # [b, s, h] -> [s, b, h]
    expected = torch.where(keep, x.double() / 0.7, 0.0).to(dtype)
    torch.testing.assert_close(dropout(x, KEY, SAMPLES, EXTENTS, 0.3), expected)
    assert 0 < keep.sum() < keep.numel()


@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_gradients(batch_dim):
    shape = [5, 8]
    shape.insert(batch_dim, 3)
    x = randn(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout(x, KEY, SAMPLES, EXTENTS, 0.3, batch_dim=batch_dim), (x,))


def test_a_rank_of_a_split_sequence_drops_its_slice_of_the_whole():
    x = randn(6, 3, 8)
    whole = dropout(x, KEY, SAMPLES, [(0, 6, 6), (0, 8, 8)], 0.3)
    for start, stop in ((0, 3), (3, 6), (1, 4)):
        assert torch.equal(dropout(x[start:stop], KEY, SAMPLES, [(start, stop, 6), (0, 8, 8)], 0.3), whole[start:stop])
    assert torch.equal(dropout(x[:, 1:2], KEY, SAMPLES[1:2], [(0, 6, 6), (0, 8, 8)], 0.3), whole[:, 1:2])


def test_the_scale_is_not_rounded_to_half_precision():
    x = torch.full((5, 3, 8), 1.75, dtype=torch.bfloat16)     # 1.75 / 0.9 = 1.944; times bf16(1 / 0.9) it would become 1.9375
    assert dropout(x, KEY, SAMPLES, EXTENTS, 0.1).max() == torch.tensor(1.75 / 0.9).bfloat16() == 1.9453125


def test_nothing_is_stored_for_the_backward_pass():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = dropout(randn(5, 3, 8).requires_grad_(), KEY, SAMPLES, EXTENTS, 0.3)
    assert out.requires_grad and not saved


def test_no_dropout_gives_x_itself():
    x = randn(5, 3, 8)
    assert dropout(x, KEY, SAMPLES, EXTENTS, 0.0) is x


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3, 8\).*\(4, 3, 8\)"):
        dropout(randn(5, 3, 8), KEY, SAMPLES, [(0, 4, 5), (0, 8, 8)], 0.3)
    with pytest.raises(ValueError, match="1.5"):
        dropout(randn(5, 3, 8), KEY, SAMPLES, EXTENTS, 1.5)


def test_under_torch_compile():
    x = randn(5, 3, 8).requires_grad_()

    def run(x, step):
        return dropout(x, KEY._replace(step=step), SAMPLES, EXTENTS, 0.3)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for step in (0, 1, 5):
        got, expected = compiled(x, step), run(x, step)
        assert torch.equal(got, expected)
        assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


BACKENDS = ["reference", "torch"]


def added(x, bias, residual, probability=0.3, backend="auto"):
    return bias_dropout_add(x, bias, residual, KEY, SAMPLES, EXTENTS, probability, backend=backend)


def operands(dtype=torch.float64):
    return [tensor.to(dtype) for tensor in (randn(5, 3, 8), randn(8, seed=1), randn(5, 3, 8, seed=2))]


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_dropout_add_is_the_definition(backend, probability):
    x, bias, residual = operands()
    keep = keep_mask(KEY, SAMPLES, EXTENTS, probability).transpose(0, 1)
    for shift in (bias, None):
        value = torch.where(keep, (x if shift is None else x + shift) / (1 - probability), 0.0)
        for other in (residual, None):
            expected = value if other is None else other + value
            torch.testing.assert_close(added(x, shift, other, probability, backend), expected)


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_dropout_add_gradients(backend, probability):
    tensors = [tensor.requires_grad_() for tensor in operands()]
    assert torch.autograd.gradcheck(lambda *t: added(*t, probability, backend), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_dropout_add_accuracy(backend, dtype):
    def run(backend):
        return lambda *tensors: added(*tensors, backend=backend)

    assert_within_twice(run(backend), lambda x, bias, residual: residual + dropout(x + bias, KEY, SAMPLES, EXTENTS, 0.3),
                        run("reference"), operands(), randn(5, 3, 8, seed=3), dtype)


def test_bias_dropout_add_refuses_a_split_width():
    x, bias, residual = operands()
    with pytest.raises(ValueError, match=r"need two, of the positions and of a whole width"):
        bias_dropout_add(x, bias, residual, KEY, SAMPLES, [(0, 5, 5), (8, 16, 16)], 0.3)
    with pytest.raises(ValueError, match=r"\(5, 3, 8\).*\(4, 3, 8\)"):
        bias_dropout_add(x, bias, residual, KEY, SAMPLES, [(0, 4, 5), (0, 8, 8)], 0.3)
    with pytest.raises(ValueError, match="dropout probability must be in"):
        added(x, bias, residual, 1.0)
