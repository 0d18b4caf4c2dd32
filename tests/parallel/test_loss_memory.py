"""What the fused projection and loss need besides their inputs, at hidden 4096, vocabulary 131072, bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalm.ops import library
from megalm.ops.registry import REGISTRY
from megalm.parallel.cross_entropy import linear_cross_entropy
from megalm.parallel.groups import TensorParallel
from megalm.plan.activations import LOGITS_BYTES, logits_chunk
from tests.parallel.live_bytes import LiveBytes

TOKENS, HIDDEN, VOCAB = 8192, 4096, 131072
ALONE = TensorParallel(0, 1, None, False)
BUDGET = VOCAB * HIDDEN * 4 + 500_000_000
"""The gradient of the weight as it is summed, and half a gigabyte, in which the gradient of the hidden states has its place."""


@pytest.fixture
def kernels(monkeypatch):
    """The megalm backend serves the meta device, where its operations only know their results' shapes."""
    monkeypatch.setattr(library, "missing", lambda device: None)
    yield
    REGISTRY.chosen.clear()


def peak(loss_of, dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS) -> tuple[int, torch.Tensor]:
    """(most bytes at once in a forward and backward pass, the weight)."""
    hidden = torch.empty(tokens, 1, HIDDEN, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(VOCAB, HIDDEN, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    live = LiveBytes()
    live.ignore(hidden, weight, labels)
    with live:
        (loss_of(hidden, weight, labels) * 0.5).backward()
    assert weight.grad.shape == weight.shape and weight.grad.dtype == dtype and hidden.grad.shape == hidden.shape
    return live.peak, weight


def fused(backend: str, **extra: float):
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, VOCAB, ALONE, backend, **extra)


def test_half_a_gigabyte_besides_the_weight_s_gradient(kernels):
    for extra in ({}, {"z_loss": 1e-4, "label_smoothing": 0.1}):
        most, _ = peak(fused("megalm", **extra))
        assert VOCAB * HIDDEN * 4 + LOGITS_BYTES <= most <= BUDGET, most


def test_plain_torch_needs_little_more():
    """Its temporaries are pieces of a chunk."""
    most, _ = peak(fused("torch", z_loss=1e-4, label_smoothing=0.1))
    assert most <= BUDGET + 50_000_000, most


def test_the_gradient_that_was_narrowed_is_handed_on_without_a_copy(kernels):
    _, weight = peak(fused("megalm"))
    assert weight.grad.untyped_storage().nbytes() == VOCAB * HIDDEN * 4


def test_the_count_sees_whole_logits():
    """Were they made anywhere, the budget would not hold."""
    def whole(hidden, weight, labels):
        logits = hidden.matmul(weight.t())
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    assert peak(whole)[0] > BUDGET + 2_000_000_000
    live, x = LiveBytes(), torch.empty(100, device="meta")
    live.ignore(x)
    with live:
        y = x + 1
        z = y.view(10, 10).t()[2:]
        del y
        assert live.now == live.peak == 400
        del z
        x.add_(1)
    assert (live.now, live.peak) == (0, 400)


def test_chunks_are_few_and_even():
    assert logits_chunk(8192, VOCAB, 2) == 1408 and logits_chunk(1536, VOCAB, 2) == 1536 and logits_chunk(100, VOCAB, 2) == 100
    assert logits_chunk(1 << 20, 1 << 30, 2) == 1
    for tokens in (1, 127, 1000, 1537, 4096, 100_000):
        for columns in (64, 6283, 16384, 131072, 262144):
            for width in (2, 4):
                chunk = logits_chunk(tokens, columns, width)
                most = LOGITS_BYTES // (columns * width)
                assert 1 <= chunk <= min(tokens, most)
                assert -(-tokens // chunk) == -(-tokens // most)
                assert chunk >= min(tokens, 1024) or columns * width * 1024 > LOGITS_BYTES or tokens < 2 * 1024
