"""The fused projection and loss against torch on the whole vocabulary: several chunks, ignored labels, padding, every tp size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalm.parallel import cross_entropy
from megalm.parallel.groups import TensorParallel
from tests import dist as ranks

S, B, H, VOCAB, PADDED = 8, 3, 16, 50, 64


def _inputs(dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator).to(dtype)
    weight = torch.randn(PADDED, H, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (B, S), generator=generator)
    labels[0, 2:] = -100
    labels[2] = -100
    return hidden, weight, labels


EXTRA = {"z_loss": 0.02, "label_smoothing": 0.2}


def _expected(dtype: torch.dtype, z_loss: float = 0.0, label_smoothing: float = 0.0) -> tuple:
    hidden, weight, labels = (x.double().requires_grad_() if x.is_floating_point() else x for x in _inputs(dtype))
    logits, labels = (hidden @ weight[:VOCAB].t()).transpose(0, 1).reshape(-1, VOCAB), labels.reshape(-1)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    loss = 3 * (loss + z_loss * logits[labels >= 0].logsumexp(1).square().sum())
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def run_loss(rank: int, world: int, sequence: bool, dtype: torch.dtype, chunk: int, extra: dict[str, float]) -> tuple:
    cross_entropy.CHUNK_ELEMENTS = chunk
    tp = TensorParallel(rank, world, dist.group.WORLD, sequence)
    hidden, weight, labels = _inputs(dtype)
    hidden = (hidden[slice(*tp.share(S))] if tp.shards_sequence else hidden).clone().requires_grad_()
    weight = weight[slice(*tp.share(PADDED))].clone().requires_grad_()
    loss = cross_entropy.linear_cross_entropy(hidden, weight, labels, VOCAB, tp, **extra) * 3
    loss.backward()
    with torch.no_grad():
        quiet = cross_entropy.linear_cross_entropy(hidden, weight, labels, VOCAB, tp, **extra) * 3
    assert torch.equal(quiet, loss.detach())
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "extra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("size", "sequence"), [(1, False), (2, False), (2, True), (4, True)], ids=["one", "tp2", "sp2", "sp4"])
def test_equals_torch(size, sequence, dtype, extra):
    """At tp 4 the last rank holds padding only; 40 logits a chunk split the tokens several times."""
    expected, expected_hidden, expected_weight = _expected(dtype, **extra)
    results = ranks.run(run_loss, size, sequence, dtype, 40 * PADDED // size // 10, extra)
    close = 1e-5 if dtype == torch.float32 else 3e-2
    hidden = torch.cat([one[1] for one in results]) if sequence else results[0][1]
    for found, wanted in ((results[0][0], expected), (hidden, expected_hidden),
                          (torch.cat([one[2] for one in results]), expected_weight)):
        assert (found.double() - wanted).abs().max() <= close * wanted.abs().max()
    assert torch.cat([one[2] for one in results])[VOCAB:].abs().max() == 0
    assert len({one[0].item() for one in results}) == 1


ALONE = TensorParallel(0, 1, None, False)


@pytest.mark.parametrize("chunk", [40 * PADDED, 1 << 24], ids=["chunks", "one chunk"])
def test_fp16_neither_overflows_nor_vanishes(chunk, monkeypatch):
    """A sum of gradients over many tokens that fp16 can't hold, and factors with which its parts would underflow."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    tokens, scale = 2048, 1 / 2048
    hidden = torch.full((tokens, 1, H), 60.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(PADDED, H, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.int64)
    (cross_entropy.linear_cross_entropy(hidden, weight, labels, VOCAB, ALONE) * scale).backward()
    expected = torch.full((PADDED, H), 60 / VOCAB)
    expected[0] -= 60
    expected[VOCAB:] = 0
    torch.testing.assert_close(weight.grad, expected.half(), rtol=2e-3, atol=0)


def test_a_second_backward_pass_is_refused():
    hidden, weight, labels = _inputs(torch.float32)
    loss = cross_entropy.linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, VOCAB, ALONE)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass has none"):
        loss.backward()
