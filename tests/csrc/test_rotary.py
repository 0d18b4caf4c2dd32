"""The torch side of the rotary kernel: registration, autograd formulas, turning in place and what protects it, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalm.ops.kernels.rotary import rotary_pack, rotary_turn_
from megalm.ops.rotary import rotary, rotary_qkv, rotary_tables
from megalm.tools.kernel_cases.accuracy import randn

HEADS, GROUPS, SIZE = 4, 2, 16
WIDTH = (HEADS + 2 * GROUPS) * SIZE
TABLES = rotary_tables(12, SIZE, 100.0, None, "cpu")
OF_ALL, OF_EACH = torch.tensor([4, 0, 7, 1, 10]), torch.tensor([[0, 5], [1, 0], [2, 1], [0, 2], [1, 3]])
OPTIONS = [dict(interleaved=turned, positions=positions) for turned in (False, True) for positions in (None, OF_ALL, OF_EACH)]


def fused(qkv, backend="megalm", **options):
    return rotary_qkv(qkv, HEADS, GROUPS, *TABLES, backend=backend, **options)


def attend(query, key, value):
    """Some attention: [s, b, H, d]."""
    key, value = (part.repeat_interleave(HEADS // GROUPS, dim=2) for part in (key, value))
    return torch.einsum("sbht,tbhd->sbhd", torch.einsum("sbhd,tbhd->sbht", query, key).softmax(-1), value)


def layer(x, weight, bias, backend="megalm", **options):
    return attend(*fused(F.linear(x, weight, bias), backend, **options))


def layer_inputs(dtype=torch.float64):
    return [tensor.to(dtype).requires_grad_() for tensor in (randn(5, 2, 6), randn(WIDTH, 6, seed=1), randn(WIDTH, seed=2))]


@pytest.mark.parametrize("positions", [None, OF_EACH])
def test_registration(shim, positions):
    query, key = randn(5, 2, HEADS, SIZE).float(), randn(5, 2, GROUPS, SIZE, seed=1).float()
    torch.library.opcheck(rotary_pack, (query, key, key, *TABLES, positions, 1, False, True))
    torch.library.opcheck(rotary_pack, (query, None, None, *TABLES, positions, 0, True, False))
    torch.library.opcheck(rotary_turn_, (randn(5, 2, WIDTH).float(), *TABLES, positions, HEADS, GROUPS, 1, False))


@pytest.mark.parametrize("options", OPTIONS)
def test_autograd_formulas(shim, options):
    positions = options["positions"]
    if positions is not None:
        positions = positions[1:3] if positions.dim() == 1 else positions[1:3, :1]
    options = dict(options, positions=positions, offset=1, backend="megalm")
    tables = rotary_tables(12, 4, 100.0, None, "cpu")  # half of the dims
    x, qkv = randn(2, 1, 2, 8).requires_grad_(), randn(2, 1, 4 * 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary(x, *tables, **options), (x,))
    assert torch.autograd.gradcheck(lambda qkv: rotary_qkv(qkv, 2, 1, *tables, **options), (qkv,))          # a leaf: out of place
    assert torch.autograd.gradcheck(lambda qkv: rotary_qkv(qkv.clone(), 2, 1, *tables, **options), (qkv,))  # in place


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_around_it_has_the_gradients_of_the_reference(shim, options, bias):
    x, weight, offset = layer_inputs()
    inputs = (x, weight, offset) if bias else (x, weight)
    arguments = (x, weight, offset if bias else None)
    got, expected = layer(*arguments, **options), layer(*arguments, backend="reference", **options)
    torch.testing.assert_close(got, expected)
    grad = randn(*got.shape, seed=3)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_in_place_makes_and_keeps_nothing(shim):
    qkv, saved = F.linear(*layer_inputs(torch.float32)), []
    place = qkv.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tuple(tensor.shape)), lambda tensor: tensor):
        query, key, value = fused(qkv)
    assert [part.data_ptr() - place for part in (query, key, value)] == [0, 4 * HEADS * SIZE, 4 * (HEADS + GROUPS) * SIZE]
    assert saved == [tuple(TABLES[0].shape)] * 2


@pytest.mark.parametrize("bias", [True, False])
def test_the_projection_can_not_be_used_again(shim, bias):
    x, weight, offset = layer_inputs(torch.float32)
    qkv = F.linear(x, weight, offset if bias else None)
    before = qkv.sin()  # keeps qkv for its backward pass
    base = qkv._base
    query, _, _ = fused(qkv)
    for used in (lambda: fused(qkv), lambda: qkv.split(SIZE, dim=-1)[1], lambda: (qkv + x.sum() * torch.ones(WIDTH)),
                 lambda: qkv.sum().backward()):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            used()
    assert base is None or base.numel() == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        query.mul_(2)


def test_in_place_where_nobody_differentiates(shim):
    plain = randn(5, 2, WIDTH).float()
    expected = fused(plain, "reference")
    with torch.inference_mode():
        qkv = plain.clone()
        torch.testing.assert_close(fused(qkv), expected)
    assert qkv.numel() == 0


def test_what_others_may_see_is_left_alone(shim):
    leaf, whole = randn(5, 2, WIDTH).float().requires_grad_(), randn(7, 2, WIDTH + 8).float()
    kept = leaf.detach().clone(), whole.clone()
    for qkv in (leaf, leaf.view(5, 2, WIDTH), whole[1:6, :, 8:], whole[:5, :, :WIDTH], whole[:5, :1, :WIDTH].expand(5, 2, WIDTH),
                whole.flatten()[8:8 + 10 * WIDTH].view(5, 2, -1)):
        torch.testing.assert_close(fused(qkv), fused(qkv.clone(), "reference"))
    assert torch.equal(leaf, kept[0]) and torch.equal(whole, kept[1])


@pytest.mark.parametrize("options", OPTIONS[::5])
def test_no_graph_break(shim, options):
    inputs = layer_inputs(torch.float32)
    x = randn(5, 2, 3, SIZE).float().requires_grad_()
    for function, arguments in ((lambda *a: layer(*a, **options), inputs),
                                (lambda x: rotary(x, *TABLES, backend="megalm", **options), [x])):
        got, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments), function(*arguments)
        torch.testing.assert_close(got, expected)
        grad = randn(*got.shape, seed=4).float()
        torch.testing.assert_close(torch.autograd.grad(got, arguments, grad), torch.autograd.grad(expected, arguments, grad))


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_and_offsets_change_nothing(shim, interleaved):
    whole = randn(6, 5, 8, 40).float()
    for x in (whole[..., 8:24], whole[..., 1:17], whole[..., :16].transpose(0, 1), whole[::2, :, 1::3, 8:24],
              whole[..., :16].transpose(1, 2), whole[..., ::2][..., :16], whole[:, :1, :, :16].expand(-1, 3, -1, -1)):
        call = lambda x: rotary(x, *TABLES, interleaved=interleaved, backend="megalm")  # noqa: E731
        view, dense = x.detach().requires_grad_(), x.contiguous().detach().requires_grad_()
        torch.testing.assert_close(call(view), call(dense), rtol=0, atol=0)
        for grad in (x, torch.ones(()).expand(x.shape)):
            torch.testing.assert_close(torch.autograd.grad(call(view), view, grad)[0],
                                       torch.autograd.grad(call(dense), dense, grad.contiguous())[0], rtol=0, atol=0)


def test_gradients_of_any_layout_are_packed(shim):
    """As attention kernels leave them: [b, heads, s, d] in memory, a part that nobody asked for, and one value for all."""
    query, key, value = (randn(2, heads, 5, SIZE).float().permute(2, 0, 1, 3) for heads in (HEADS, GROUPS, GROUPS))
    for grads in ((query, key, value), (query, key, None), (torch.ones(()).expand(query.shape), key, value)):
        inputs, results = layer_inputs(torch.float32), []
        for backend in ("megalm", "reference"):
            parts = fused(F.linear(*inputs), backend)
            pairs = [(part, grad) for part, grad in zip(parts, grads, strict=True) if grad is not None]
            results.append(torch.autograd.grad([part for part, _ in pairs], inputs, [grad for _, grad in pairs]))
        torch.testing.assert_close(*results)


def test_a_position_outside_the_tables_is_nan_and_nothing_else(shim):
    x = randn(3, 1, 2, SIZE).float()
    y = rotary(x, *TABLES, positions=torch.tensor([2, 12, -1]), backend="megalm")
    torch.testing.assert_close(y[0], rotary(x, *TABLES, positions=torch.tensor([2, 0, 0]), backend="megalm")[0])
    assert y[1:].isnan().all()
    with pytest.raises((IndexError, RuntimeError)):
        rotary(x, *TABLES, positions=torch.tensor([2, 12, -1]), backend="torch")


def test_no_tokens(shim):
    x = torch.empty(0, 2, 3, SIZE, requires_grad=True)
    assert torch.autograd.grad(rotary(x, *TABLES, backend="megalm").sum(), x)[0].shape == x.shape
    assert [part.shape for part in fused(torch.empty(0, 2, WIDTH))] == [(0, 2, n, SIZE) for n in (HEADS, GROUPS, GROUPS)]


def test_what_is_refused(shim):
    x = torch.ones(3, 1, 2, SIZE)
    with pytest.raises(ValueError, match="sin is torch.float64 on cpu; it must be torch.float32"):
        rotary(x, TABLES[0], TABLES[1].double(), backend="megalm")
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, not int64"):
        rotary(x.long(), *TABLES, backend="megalm")
    with pytest.raises(ValueError, match="positions are torch.int32"):
        rotary_pack(x, None, None, *TABLES, torch.ones(3, dtype=torch.int32), 0, False, False)
    with pytest.raises(ValueError, match="key is torch.float64"):
        rotary_pack(x, x.double(), None, *TABLES, None, 0, False, False)
