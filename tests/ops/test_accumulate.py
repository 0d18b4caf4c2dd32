"""fp32 sums of half-precision products whatever the device offers, and the way back in place."""

from __future__ import annotations

import pytest
import torch

from megalm.ops import accumulate
from megalm.ops.accumulate import add_product, fp32_product, narrowed
from megalm.tools.kernel_cases.accuracy import randn

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("offered", ["nothing", "products", "sums"])
def test_products_are_summed_in_fp32(monkeypatch, dtype, offered):
    """What CUDA offers, played by fp32 products on the CPU."""
    called = []

    def mm(a, b, *, out_dtype):
        called.append("mm")
        return a.float() @ b.float()

    def addmm(total, a, b, *, out_dtype, out):
        assert out is total
        called.append("addmm")
        out += a.float() @ b.float()

    monkeypatch.setattr(accumulate, "_multiplies", lambda *_: offered != "nothing")
    monkeypatch.setattr(accumulate, "_adds", lambda *_: offered == "sums")
    monkeypatch.setattr(accumulate, "BLOCK_ROWS", 3)
    if offered != "nothing":
        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch, "addmm", addmm)
    a, b = randn(10, 7).to(dtype), randn(7, 5, seed=1).to(dtype)
    total = fp32_product(a, b)
    add_product(total, a, b)
    exact = 2 * (a.double() @ b.double())
    rounded = offered == "nothing" and dtype == torch.bfloat16
    torch.testing.assert_close(total.double(), exact, rtol=1e-2 if rounded else 1e-5, atol=1e-2 if rounded else 1e-5)
    assert called == {"nothing": [], "products": ["mm"] * 5, "sums": ["mm", "addmm"]}[offered]


def test_what_this_torch_offers_is_found_out():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert not accumulate._multiplies(cpu, torch.bfloat16) and not accumulate._adds(cpu, torch.bfloat16)
    assert accumulate._multiplies(meta, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 64), (17, 241), (100, 1003)])
def test_narrowing_in_place_is_a_product_and_a_rounding(shape, dtype):
    """Shorter than, as long as and longer than what goes through a temporary."""
    values, factor = randn(*shape).float(), torch.tensor(0.3)
    expected = (values * factor).to(dtype)
    narrow = narrowed(values, dtype, factor)
    assert torch.equal(narrow, expected) and narrow.data_ptr() == values.data_ptr() and narrow.is_contiguous()
    same = randn(*shape).to(dtype)
    assert narrowed(same, dtype, factor).data_ptr() == same.data_ptr()
