"""What is Hopper's own of attention: which path serves a call, sums in any order, and mistakes that the shim sees."""

from __future__ import annotations

import ctypes

import pytest
import torch

from megalm.ops.attention import attention
from megalm.ops.kernels.attention import portable
from megalm.ops.library import Library
from megalm.ops.random import ATTENTION_SCORES, DropoutKey
from megalm.tools.kernel_cases.accuracy import randn

KEY = DropoutKey(1234, 5, 3, ATTENTION_SCORES)


def tensors(s, heads=1, groups=1, dim=64, batch=1):
    return [randn(s, batch, count, dim, seed=seed).to(torch.bfloat16).requires_grad_()
            for seed, count in enumerate((heads, groups, groups))]


def results(inputs, **options):
    out = attention(*inputs, backend="megalm", **options)
    return [out, *torch.autograd.grad(out.float().sin().sum(), inputs)]


@pytest.fixture
def workspaces(monkeypatch):
    """The bytes of workspace of each backward pass: Hopper's alone has any."""
    found, count = [], Library.count

    def noted(self, name, params):
        found.append(count(self, name, params))
        return found[-1]

    monkeypatch.setattr(Library, "count", noted)
    return found


@pytest.mark.parametrize("dim, dropped, by_hopper",
                         [(64, False, True), (128, False, True), (96, False, False), (64, True, False)])
def test_which_path_serves(shim, workspaces, dim, dropped, by_hopper):
    """What Hopper's path doesn't cover falls to the portable one, and so does everything where that is asked for."""
    options = {"dropout": 0.1, "key": KEY, "samples": torch.arange(1)} if dropped else {}
    inputs = tensors(20, dim=dim)
    first = results(inputs, **options)
    with portable():
        second = results(inputs, **options)
    assert [size > 0 for size in workspaces] == [by_hopper, False]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_the_workspace_is_of_the_queries_alone(shim, workspaces):
    """Sums in fp32 of the queries, rounded up to tiles, a ticket and the turns: nothing of s x s."""
    results(tensors(130, heads=2, dim=128))
    results(tensors(130, heads=2, dim=64))
    turns = [-(-4 * (1 + 2 * 2 * tiles) // 128) * 128 for tiles in (3, 2)]
    assert workspaces == [turns[0] + 4 * 2 * 192 * 128, turns[1] + 4 * 2 * 256 * 64]


@pytest.mark.parametrize("order", [0, 1, 7])
def test_sums_in_any_order_and_in_turns(shim, order):
    """Without turns the queries' gradient is the same but for rounding, and everything else to the bit."""
    inputs = tensors(300, heads=2, dim=128)
    shim.set_order(order)
    free = results(inputs)
    ordered = results(inputs, deterministic=True)
    shim.set_order(0)
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(free, ordered, strict=True)) if i != 1)
    torch.testing.assert_close(free[1], ordered[1], rtol=1e-2, atol=1e-3)


def test_views_that_the_copy_engine_cannot_address(shim):
    """A stride of 0, as expand makes: the portable path takes it."""
    q, k, v = (x.detach() for x in tensors(20, heads=2, groups=2))
    shared = k[:, :, :1].expand(-1, -1, 2, -1)
    got, expected = (attention(q, keys, v, backend="megalm") for keys in (shared, shared.contiguous()))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


# What the shim makes of mistakes: a branch of one kernel each, and a part of what it says.

KERNEL = """
#include "common/wgmma.cuh"
__global__ void wrong(int mistake) {
  MEGALM_DYNAMIC_SHARED(unsigned char, shared);
  uint64_t *const barrier = reinterpret_cast<uint64_t *>(shared);
  float d[8][4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x == 0) barrier_start(barrier, 2);
  barriers_started();
  __syncthreads();
  const auto multiply = [&](const unsigned char *tile) {
    Multiply<bf16, 64>::registers<false, Order::across>(d, a, across(tile, 1024));
  };
  switch (mistake) {
BODIES
  }
}
MEGALM_C const char *run(int mistake) {
  MEGALM_LAUNCH(wrong, dim3(1), dim3(256), 8192, nullptr, mistake);
  return cudaGetErrorString(cudaGetLastError());
}
"""
MISTAKES = (
    ("barrier_wait(barrier + 1, 0);", "a barrier is used that was never started"),
    ("if (threadIdx.x < 2) barrier_expect(barrier, 16); __syncthreads(); barrier_arrive(barrier);", "more arrivals at a barrier"),
    ("barrier_wait(barrier, 0);", "deadlock"),
    ("if (threadIdx.x < 2) barrier_expect(barrier, 16); barrier_wait(barrier, 0);", "deadlock"),
    ("if (threadIdx.x < 128) named_wait(1, 256); else named_wait(1, 128);", "disagree on a named barrier"),
    ("if (threadIdx.x < 32) named_arrive(1, 256);", "nobody waits for"),
    ("multiply(shared + 1024);", "without a fence"),
    ("matrix_fence(); multiply(shared + 1024); matrix_commit();", "never waited for"),
    ("matrix_fence(); multiply(shared + 1024); matrix_commit(); matrix_settle(d);", "still writes"),
    ("if (threadIdx.x >= 32) { matrix_fence(); multiply(shared + 1024); matrix_commit(); matrix_wait<0>(); }", "don't all issue"),
    ("matrix_fence(); multiply(shared + 1024 + threadIdx.x / 32 * 1024);", "disagree on a matrix instruction"),
    ("matrix_fence(); multiply(shared + 1024 + 128); matrix_commit(); matrix_wait<0>();", "within eight rows"),
    ("matrix_fence(); multiply(shared + 8192 - 1024); matrix_commit(); matrix_wait<0>();", "beyond shared memory"),
    ("if (threadIdx.x == 0) store_operand(shared + 1024, 0); __syncthreads(); "
     "matrix_fence(); multiply(shared + 1024); matrix_commit(); matrix_wait<0>();", "no fence_async covers"),
    ("if (threadIdx.x == 0) store_operand(shared + 1024, 0); fence_async(); __syncthreads(); "
     "matrix_fence(); multiply(shared + 1024); matrix_commit(); matrix_wait<0>(); matrix_settle(d);", "no error"),
)


def test_the_shim_sees_mistakes(build_with_shim, tmp_path):
    source, built = tmp_path / "mistakes.cpp", tmp_path / "mistakes.so"
    bodies = "\n".join(f"    case {number}: {body} break;" for number, (body, _) in enumerate(MISTAKES))
    source.write_text(KERNEL.replace("BODIES", bodies))
    build_with_shim(source, built, "-shared")
    run = ctypes.CDLL(str(built)).run
    run.restype = ctypes.c_char_p
    found = [run(number).decode() for number in range(len(MISTAKES))]
    assert [said for said, (_, part) in zip(found, MISTAKES, strict=True) if part not in said] == []
