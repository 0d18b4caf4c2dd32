"""Chunk statistics and gradients against F.cross_entropy, over vocabulary shards, with padding and ignored targets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megalm.ops import cross_entropy as module
from megalm.ops.cross_entropy import chunk_gradient, chunk_loss, chunk_statistics, loss_of
from megalm.tools.kernel_cases.accuracy import randn
from tests.ops.dtypes import DTYPES

BACKENDS = ["reference", "torch"]
N, VOCAB, PADDED = 23, 37, 48


def example(scale: float = 4.0):
    logits = scale * randn(N, PADDED)
    targets = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(1))
    targets[[3, 8]] = -100
    targets[5] = VOCAB - 1
    return logits, targets, torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * (targets >= 0)


EXTRA = {"plain": {}, "z-loss": {"z_loss": 0.02}, "smoothed": {"label_smoothing": 0.2},
         "both": {"z_loss": 0.02, "label_smoothing": 0.2}}


def sharded(logits, targets, weight, shards: int, backend: str, z_loss: float = 0.0, label_smoothing: float = 0.0):
    """Loss of each token and the gradient, as parallel/cross_entropy.py makes them: reductions over the shards."""
    width = logits.shape[1] // shards
    parts = [logits[:, rank * width:(rank + 1) * width].clone() for rank in range(shards)]
    statistics = [chunk_statistics(part, targets, rank * width, VOCAB, label_smoothing=label_smoothing, backend=backend)
                  for rank, part in enumerate(parts)]
    maximum = torch.stack([part[0] for part in statistics]).amax(0)
    total = sum(part[1] * torch.exp(part[0] - maximum) for part in statistics)
    logsumexp = maximum.double() + total.double().log()
    loss = weight * loss_of(logsumexp, sum(part[2] for part in statistics), z_loss)
    gradients = [chunk_gradient(part, targets, rank * width, VOCAB, logsumexp, weight, z_loss=z_loss,
                                label_smoothing=label_smoothing, backend=backend) for rank, part in enumerate(parts)]
    return loss, torch.cat(gradients, dim=1)


def whole(logits, targets, weight, backend: str, **extra: float):
    """The same where one rank holds the vocabulary."""
    gradient = logits.clone()
    return chunk_loss(gradient, targets, VOCAB, weight, **extra, backend=backend), gradient


def expected(logits, targets, weight, z_loss: float = 0.0, label_smoothing: float = 0.0):
    leaf = logits.double().detach().requires_grad_()
    loss = F.cross_entropy(leaf[:, :VOCAB], targets, reduction="none", ignore_index=-100, label_smoothing=label_smoothing)
    loss = weight.double() * (loss + z_loss * leaf[:, :VOCAB].logsumexp(1).square())
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8, 48])   # 8: the last ranks hold padding only; 48: a column each
@pytest.mark.parametrize("extra", EXTRA)
def test_float64_equals_cross_entropy_under_every_sharding(shards, backend, extra):
    logits, targets, weight = example()
    wanted = expected(logits, targets, weight, **EXTRA[extra])
    found = [sharded(logits, targets, weight, shards, backend, **EXTRA[extra])]
    found += [whole(logits, targets, weight, backend, **EXTRA[extra])] if shards == 1 else []
    for results in found:
        for got, value in zip(results, wanted, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", EXTRA)
def test_accuracy(backend, dtype, extra):
    z_loss, label_smoothing = (EXTRA[extra].get(name, 0.0) for name in ("z_loss", "label_smoothing"))
    logits, targets, weight = example(scale=10.0)
    logits, weight = logits.to(dtype), weight.float()
    exact_loss, exact_grad = expected(logits, targets, weight, **EXTRA[extra])
    loss, grad = sharded(logits, targets, weight, 2, backend, **EXTRA[extra])
    one_loss, one_grad = whole(logits, targets, weight.double(), backend, **EXTRA[extra])
    assert grad.dtype == one_grad.dtype == dtype
    leaf = logits.detach().requires_grad_()
    values = leaf[:, :VOCAB].float()
    plain = F.cross_entropy(values, targets, reduction="none", ignore_index=-100, label_smoothing=label_smoothing)
    plain = weight * (plain + z_loss * values.logsumexp(1).square())
    plain_grad, = torch.autograd.grad(plain.sum(), leaf)
    for got, other, exact in ((loss, plain.detach(), exact_loss), (grad, plain_grad, exact_grad),
                              (one_loss, plain.detach(), exact_loss), (one_grad, plain_grad, exact_grad)):
        error, plain_error = ((value.double() - exact).abs().max() for value in (got, other))
        unit = torch.finfo(other.dtype).eps * exact.abs().max()
        assert error <= 2 * plain_error + 0.5 * unit


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_differentiate_to_the_gradient(backend):
    logits, targets, weight = example()
    leaf = logits[:5].clone().requires_grad_()

    def loss(values):
        maximum, total, target_logit = chunk_statistics(values, targets[:5], 0, VOCAB, backend="reference")
        return weight[:5] * (maximum + total.log() - target_logit)

    assert torch.autograd.gradcheck(loss, (leaf,))
    logsumexp = torch.logsumexp(logits[:5, :VOCAB], dim=1)
    got = chunk_gradient(logits[:5].clone(), targets[:5], 0, VOCAB, logsumexp, weight[:5], backend=backend)
    torch.testing.assert_close(got, torch.autograd.grad(loss(leaf).sum(), leaf)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_target_contributes_nothing(backend):
    logits, targets, weight = example()
    _, _, target_logit = chunk_statistics(logits, targets, 0, VOCAB, backend=backend)
    assert (target_logit[targets == -100] == 0).all() and (target_logit[targets >= 0] != 0).all()
    _, grad = sharded(logits, targets, weight, 1, backend)
    assert (grad[targets == -100] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", [1, 8])
def test_padding_neither_wins_nor_learns(shards, backend):
    logits, targets, weight = example()
    logits[:, VOCAB:] = 1e4
    loss, grad = sharded(logits, targets, weight, shards, backend)
    assert loss.isfinite().all() and (grad[:, VOCAB:] == 0).all()
    logits[:, VOCAB:] = torch.nan
    assert (sharded(logits, targets, weight, shards, backend)[1][:, VOCAB:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    logits = torch.tensor([[3e4, -3e4, 2.9e4], [-3e4, -3e4, -3e4]])
    loss, _ = sharded(torch.cat((logits, torch.zeros(2, PADDED - 3)), 1)[:, :3].float(), torch.tensor([2, 0]),
                      torch.ones(2), 1, backend)
    torch.testing.assert_close(loss, torch.tensor([1000.0, math.log(3)], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_takes_the_place_of_the_logits(dtype):
    logits, targets, weight = example()
    logits = logits.to(dtype)
    logsumexp = torch.logsumexp(logits[:, :VOCAB].float(), dim=1)
    assert chunk_gradient(logits, targets, 0, VOCAB, logsumexp, weight.float()).data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_pieces_of_rows_leave_no_seam(monkeypatch, dtype):
    logits, targets, weight = example()
    logits, weight = logits.to(dtype), weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
    def both():
        extra = EXTRA["both"]
        return *sharded(logits, targets, weight, 2, "torch", **extra), *whole(logits, targets, weight, "torch", **extra)

    at_once = both()
    monkeypatch.setattr(module, "rows_in_cache", lambda width: 4)
    for got, value in zip(both(), at_once, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_without_rows(backend):
    logits, targets = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    assert [part.shape for part in chunk_statistics(logits, targets, 0, 8, backend=backend)] == [(0,)] * 3
    assert chunk_gradient(logits, targets, 0, 8, torch.empty(0), torch.empty(0), backend=backend).shape == (0, 8)
