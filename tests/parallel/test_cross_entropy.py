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


def _expected(dtype: torch.dtype) -> tuple:
    hidden, weight, labels = (x.double().requires_grad_() if x.is_floating_point() else x for x in _inputs(dtype))
    logits = hidden @ weight[:VOCAB].t()
    loss = F.cross_entropy(logits.transpose(0, 1).reshape(-1, VOCAB), labels.reshape(-1), reduction="sum") * 3
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def run_loss(rank: int, world: int, sequence: bool, dtype: torch.dtype, chunk: int) -> tuple:
    cross_entropy.CHUNK_ELEMENTS = chunk
    tp = TensorParallel(rank, world, dist.group.WORLD, sequence)
    hidden, weight, labels = _inputs(dtype)
    hidden = (hidden[slice(*tp.share(S))] if tp.shards_sequence else hidden).clone().requires_grad_()
    weight = weight[slice(*tp.share(PADDED))].clone().requires_grad_()
    loss = cross_entropy.linear_cross_entropy(hidden, weight, labels, VOCAB, tp) * 3
    loss.backward()
    with torch.no_grad():
        quiet = cross_entropy.linear_cross_entropy(hidden, weight, labels, VOCAB, tp) * 3
    assert torch.equal(quiet, loss.detach())
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("size", "sequence"), [(1, False), (2, False), (2, True), (4, True)], ids=["one", "tp2", "sp2", "sp4"])
def test_equals_torch(size, sequence, dtype):
    """At tp 4 the last rank holds padding only; 40 logits a chunk split the tokens several times."""
    expected, expected_hidden, expected_weight = _expected(dtype)
    results = ranks.run(run_loss, size, sequence, dtype, 40 * PADDED // size // 10)
    close = 1e-5 if dtype == torch.float32 else 3e-2
    hidden = torch.cat([one[1] for one in results]) if sequence else results[0][1]
    for found, wanted in ((results[0][0], expected), (hidden, expected_hidden),
                          (torch.cat([one[2] for one in results]), expected_weight)):
        assert (found.double() - wanted).abs().max() <= close * wanted.abs().max()
    assert torch.cat([one[2] for one in results])[VOCAB:].abs().max() == 0
    assert len({one[0].item() for one in results}) == 1
