"""The torch side of the cross entropy kernels: registration, derivatives, torch.compile, strides and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.ops.cross_entropy import chunk_gradient, chunk_loss, chunk_statistics, loss_of
from megalm.ops.kernels.cross_entropy import cross_entropy_gradient, cross_entropy_loss, cross_entropy_statistics
from megalm.tools.kernel_cases.accuracy import randn

N, VOCAB, WIDTH = 5, 30, 37
EXTRA = [{}, {"z_loss": 0.02}, {"label_smoothing": 0.2}, {"z_loss": 0.02, "label_smoothing": 0.2}]


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [5, 37] of which 7 are padding, targets with one ignored, weights."""
    targets = torch.tensor([3, -100, VOCAB - 1, 0, 17])
    return (3 * randn(N, WIDTH)).to(dtype), targets, torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0], dtype=torch.float64)


def test_registration(shim):
    logits, targets, weight = example()
    torch.library.opcheck(cross_entropy_statistics, (logits, targets, 0, VOCAB, 0.1))
    lse = logits[:, :VOCAB].double().logsumexp(1)
    torch.library.opcheck(cross_entropy_gradient, (logits.clone(), targets, 0, VOCAB, lse, weight, 0.01, 0.1))
    torch.library.opcheck(cross_entropy_loss, (logits.clone(), targets, VOCAB, weight, 0.01, 0.1))


class _Loss(torch.autograd.Function):
    """chunk_loss with the gradient that it left in the logits' place."""

    @staticmethod
    def forward(ctx, logits, targets, weight, extra):
        gradient = logits.clone()
        loss = chunk_loss(gradient, targets, VOCAB, weight, **extra, backend="megalm")
        ctx.save_for_backward(gradient)
        return loss.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None, None


@pytest.mark.parametrize("extra", EXTRA)
def test_the_gradient_is_the_loss_s(shim, extra):
    logits, targets, weight = example(torch.float64)
    assert torch.autograd.gradcheck(lambda x: _Loss.apply(x, targets, weight, extra), logits.requires_grad_())


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("shards", [2, 3, 37])  # of 37 the last ones hold padding only
def test_shards_make_the_whole(shim, shards, extra):
    """Statistics, their reduction and gradients of shards equal loss and gradient of the whole vocabulary, in float64."""
    logits, targets, weight = example(torch.float64)
    whole = logits.clone()
    loss = chunk_loss(whole, targets, VOCAB, weight, **extra, backend="megalm")
    parts = [part.clone() for part in logits.tensor_split(shards, dim=1)]
    starts = [sum(part.shape[1] for part in parts[:rank]) for rank in range(shards)]
    smoothing = extra.get("label_smoothing", 0.0)
    found = [chunk_statistics(part, targets, start, VOCAB, label_smoothing=smoothing, backend="megalm")
             for part, start in zip(parts, starts, strict=True)]
    maximum = torch.stack([one[0] for one in found]).amax(0)
    total = sum(one[1] * torch.exp(one[0] - maximum) for one in found)
    lse = maximum + total.log()
    torch.testing.assert_close(weight * loss_of(lse, sum(one[2] for one in found), extra.get("z_loss", 0.0)), loss)
    gradients = [chunk_gradient(part, targets, start, VOCAB, lse, weight, **extra, backend="megalm")
                 for part, start in zip(parts, starts, strict=True)]
    torch.testing.assert_close(torch.cat(gradients, dim=1), whole, rtol=1e-12, atol=1e-15)


def test_no_graph_break(shim):
    targets, weight = example()[1:]

    def both(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        other = logits.clone()
        maximum, total, _ = chunk_statistics(logits, targets, 0, VOCAB, label_smoothing=0.2, backend="megalm")
        lse = maximum.double() + total.double().log()
        gradient = chunk_gradient(logits * 1.0, targets, 0, VOCAB, lse, weight, **EXTRA[3], backend="megalm")
        loss = chunk_loss(other, targets, VOCAB, weight, **EXTRA[3], backend="megalm")
        return gradient, loss, other

    got = torch.compile(both, backend="aot_eager", fullgraph=True)(example()[0])
    for one, expected in zip(got, both(example()[0]), strict=True):
        torch.testing.assert_close(one, expected)
    torch.testing.assert_close(got[0], got[2])


def test_strides_and_offsets_change_nothing(shim):
    """Whatever rows lie in, the gradient is in their place and nothing beside them is written."""
    logits, targets, weight = example()
    expected = logits.clone()
    loss = chunk_loss(expected, targets, VOCAB, weight, z_loss=0.1, label_smoothing=0.1, backend="megalm")
    lse = logits[:, :VOCAB].double().logsumexp(1)
    spaces = {"wider": (N, 44), "one element in": (N, WIDTH + 1), "transposed": (WIDTH, N), "every other": (2 * N, 2 * WIDTH)}
    views = {"wider": lambda t: t[:, :WIDTH], "one element in": lambda t: t[:, 1:], "transposed": lambda t: t.t(),
             "every other": lambda t: t[::2, ::2]}
    for name, view in views.items():
        for run in ("loss", "gradient"):
            space = torch.full(spaces[name], 7.0)
            view(space).copy_(logits)
            others = torch.ones_like(space, dtype=torch.bool)
            view(others).fill_(False)
            if run == "loss":
                got = chunk_loss(view(space), targets, VOCAB, weight, z_loss=0.1, label_smoothing=0.1, backend="megalm")
                torch.testing.assert_close(got, loss)
            else:
                chunk_gradient(view(space), targets, 0, VOCAB, lse, weight, z_loss=0.1, label_smoothing=0.1, backend="megalm")
            torch.testing.assert_close(view(space), expected, msg=name)
            assert (space[others] == 7).all(), name
        space = torch.full(spaces[name], torch.nan)
        view(space).copy_(logits)
        for a, b in zip(chunk_statistics(view(space), targets, 0, VOCAB, backend="megalm"),
                        chunk_statistics(logits, targets, 0, VOCAB, backend="megalm"), strict=True):
            torch.testing.assert_close(a, b)


def test_rows_that_share_memory_are_not_written(shim):
    targets, weight = example()[1:]
    with pytest.raises(RuntimeError, match="single memory location"):
        chunk_loss(torch.ones(WIDTH).expand(N, WIDTH), targets, VOCAB, weight, backend="megalm")


@pytest.mark.parametrize("backend", ["torch", "megalm"])
def test_an_ignored_token_has_no_gradient_unless_its_logits_are_not_finite(shim, backend):
    """A weight of 0 hides no broken logit: both backends make the whole row NaN."""
    logits, targets, weight = example()
    logits[0, 5] = torch.inf
    gradient = logits.clone()
    loss = chunk_loss(gradient, torch.full_like(targets, -100), VOCAB, 0 * weight, **EXTRA[3], backend=backend)
    assert loss[0].isnan() and gradient[0, :VOCAB].isnan().all() and not gradient[0, VOCAB:].any()
    assert not loss[1:].any() and not gradient[1:].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(0, VOCAB), slice(8, 16)])
def test_a_logit_that_is_not_finite_is_seen(shim, value, columns):
    """Also where one thread sees nothing else, so that its maximum says nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets, weight = example(dtype)
        logits[0, columns] = value
        _, total, _ = chunk_statistics(logits, targets, 0, VOCAB, backend="megalm")
        assert total[0].isnan() and total[1:].isfinite().all()
        assert chunk_loss(logits, targets, VOCAB, weight, backend="megalm")[0].isnan() and logits[0, :VOCAB].isnan().all()


def test_minus_infinity_is_a_probability_of_zero(shim):
    """A masked logit, as some heads have it, in any share of a thread."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, _, weight = example(dtype)
        logits[:, :16] = -torch.inf
        targets = torch.full((N,), 20)
        expected = logits.clone()
        loss = chunk_loss(expected, targets, VOCAB, weight, backend="torch")
        got = chunk_loss(logits, targets, VOCAB, weight, backend="megalm")
        torch.testing.assert_close(got, loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits, expected)
        assert not logits[:, :16].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_and_losses_have_fp32_s_digits_whatever_the_logits(shim, dtype):
    """Half precision only stores. Far from 0 a maximum's multiple is rounded by more than an fp32 sum may be off."""
    logits = (2 * randn(16, 1000, seed=3) + 250).to(dtype)
    targets, weight = torch.arange(16), torch.ones(16, dtype=torch.float64)
    exact, found = (chunk_statistics(x, targets, 0, 1000, backend=backend) for x, backend in
                    ((logits.double(), "reference"), (logits, "megalm")))
    for one, value in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), value, rtol=3e-7, atol=0)
    loss = chunk_loss(logits.double(), targets, 1000, weight, backend="reference")
    torch.testing.assert_close(chunk_loss(logits, targets, 1000, weight, backend="megalm"), loss, rtol=0, atol=3e-7)


def test_nothing_to_do(shim):
    empty, none = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    assert [part.shape for part in chunk_statistics(empty, none, 0, 8, backend="megalm")] == [(0,)] * 3
    assert chunk_gradient(empty, none, 0, 8, torch.empty(0), torch.empty(0), backend="megalm").shape == (0, 8)
    assert chunk_loss(empty, none, 8, torch.empty(0), backend="megalm").shape == (0,)
    logits = torch.ones(2, 8)
    maximum, total, expected = chunk_statistics(logits, torch.tensor([1, 2]), 40, 40, label_smoothing=0.1, backend="megalm")
    assert (maximum == -torch.inf).all() and not total.any() and not expected.any()
    assert not chunk_gradient(logits, torch.tensor([1, 2]), 40, 40, torch.ones(2), torch.ones(2), backend="megalm").any()


def test_what_is_refused(shim):
    logits, targets, weight = example()
    with pytest.raises(ValueError, match=r"it takes \[n, V\] and at least one entry"):
        chunk_loss(logits[0], targets, VOCAB, weight, backend="megalm")
    with pytest.raises(ValueError, match="over 0 entries"):
        chunk_loss(logits, targets, 0, weight, backend="megalm")
    with pytest.raises(ValueError, match="targets are torch.int32; they must be torch.int64"):
        chunk_statistics(logits, targets.int(), 0, VOCAB, backend="megalm")
    with pytest.raises(ValueError, match=r"weight: \(3,\) on cpu; it must be \[5\] on cpu"):
        chunk_loss(logits, targets, VOCAB, weight[:3], backend="megalm")
    with pytest.raises(ValueError, match=r"logsumexp: \(1,\) on cpu"):
        chunk_gradient(logits, targets, 0, VOCAB, weight[:1], weight, backend="megalm")
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, not int64"):
        chunk_loss(logits.long(), targets, VOCAB, weight, backend="megalm")
