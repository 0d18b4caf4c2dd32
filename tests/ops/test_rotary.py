"""Rotary positions: tables against the published formulas, rotation against complex numbers, gradients, accuracy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megalm.ops import rotary as module
from megalm.ops.rotary import rotary, rotary_qkv, rotary_tables
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from tests.ops.dtypes import DTYPES

BACKENDS = ["reference", "torch"]
SHAPES = [(5, 2, 3, 8), (1, 1, 1, 2), (7, 1, 5, 6), (16, 3, 1, 64)]
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_seq_length": 8192}


def tables(shape):
    return rotary_tables(shape[0], shape[-1], 10000.0, None, "cpu")


def call(shape, backend):
    return lambda x: rotary(x, *tables(shape), backend=backend)


def plain(shape):
    """As written in most models: the tables cast to the dtype of x."""
    def run(x):
        cos, sin = (torch.cat((table, table), -1)[:, None, None].to(x.dtype) for table in tables(shape))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), -1) * sin
    return run


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    x = randn(3, 2, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(call(x.shape, backend), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_multiplication_by_unit_complex_numbers(shape, backend):
    x, half = randn(*shape), shape[-1] // 2
    turned = call(shape, backend)(x)
    for position in range(shape[0]):
        for pair in range(half):
            turn = complex(*(math.cos(a), math.sin(a))) if (a := position * 10000.0 ** (-2 * pair / shape[-1])) else 1
            z = torch.complex(x[position, ..., pair], x[position, ..., pair + half]) * turn
            torch.testing.assert_close(turned[position, ..., pair], z.real, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(turned[position, ..., pair + half], z.imag, rtol=1e-6, atol=1e-6)


POSITIONS = [None, torch.tensor([0, 3, 1, 0, 7]), torch.tensor([[0, 4], [1, 5], [0, 0], [1, 9], [2, 1]])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_pairs_dims_and_positions(positions, interleaved, backend):
    """Pair by pair as complex numbers: 6 of 8 dims turned, tables longer than the sequence, offset 2."""
    x, dims, offset = randn(5, 2, 3, 8), 6, 2
    turned = rotary(x, *rotary_tables(12, dims, 100.0, None, "cpu"), interleaved=interleaved, offset=offset, positions=positions,
                    backend=backend)
    assert torch.equal(turned[..., dims:], x[..., dims:])
    for s in range(5):
        for b in range(2):
            place = s if positions is None else positions[s] if positions.dim() == 1 else positions[s, b]
            for pair in range(dims // 2):
                first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dims // 2)
                angle = (int(place) + offset) * 100.0 ** (-2 * pair / dims)
                z = torch.complex(x[s, b, :, first], x[s, b, :, second]) * complex(math.cos(angle), math.sin(angle))
                torch.testing.assert_close(turned[s, b, :, first], z.real, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(turned[s, b, :, second], z.imag, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_gradients_of_pairs_dims_and_positions(positions, interleaved, backend):
    cos, sin = rotary_tables(12, 4, 100.0, None, "cpu")
    options = dict(interleaved=interleaved, positions=positions, offset=1, backend=backend)
    qkv = randn(5, 2, 4 * 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: rotary_qkv(qkv, 2, 1, cos, sin, **options), (qkv,))
    x = qkv.detach().unflatten(-1, (4, 6))
    query, key, value = rotary_qkv(qkv, 2, 1, cos, sin, **options)
    torch.testing.assert_close(query, rotary(x[:, :, :2], cos, sin, **options))
    torch.testing.assert_close(key, rotary(x[:, :, 2:3], cos, sin, **options))
    assert torch.equal(value, x[:, :, 3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:])
def test_accuracy(shape, backend, dtype):
    assert_within_twice(call(shape, backend), plain(shape), call(shape, "reference"), [randn(*shape)], randn(*shape, seed=3),
                        dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_projection_and_strided_gradients(dtype):
    qkv = randn(5, 2, 3 * 24).to(dtype)
    for x in (qkv[..., 24:48].unflatten(-1, (3, 8)), qkv.transpose(0, 1)[..., :24].unflatten(-1, (3, 8)).transpose(0, 1),
              qkv.unflatten(-1, (9, 8))[:, :, ::3]):
        view, dense = x.detach().requires_grad_(), x.contiguous().detach().requires_grad_()
        got, expected = call(x.shape, "torch")(view), call(x.shape, "torch")(dense)
        assert torch.equal(got, expected)
        grad = randn(2, 5, 3, 8, seed=2).to(dtype).transpose(0, 1)
        assert torch.equal(torch.autograd.grad(got, view, grad)[0], torch.autograd.grad(expected, dense, grad)[0])
        broadcast = torch.ones((), dtype=dtype).expand(got.shape)
        again = call(x.shape, "torch")(view)
        torch.testing.assert_close(torch.autograd.grad(again, view, broadcast)[0],
                                   torch.autograd.grad(call(x.shape, "reference")(dense), dense, broadcast)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_of_positions_leave_no_seam(monkeypatch, dtype):
    x = randn(11, 2, 3, 8).to(dtype)
    whole = call(x.shape, "torch")(x)
    monkeypatch.setattr(module, "_PIECE", 2 * 48)
    assert torch.equal(call(x.shape, "torch")(x), whole)


def test_only_tables_are_kept_for_the_backward_pass():
    saved = []
    x = randn(5, 2, 3, 8).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tuple(tensor.shape)), lambda saved: saved)
    with hooks:
        call(x.shape, "torch")(x)
    assert saved == [(5, 4), (5, 4)]


def test_tables_are_the_angles_of_each_position():
    cos, sin = rotary_tables(6, 8, 500.0, None, "cpu")
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (6, 4)
    for position in range(6):
        for pair in range(4):
            angle = position * 500.0 ** (-2 * pair / 8)
            assert math.isclose(cos[position, pair], math.cos(angle), abs_tol=1e-7)
            assert math.isclose(sin[position, pair], math.sin(angle), abs_tol=1e-7)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, LLAMA3])
def test_an_offset_continues_the_tables(scaling):
    whole, rest = rotary_tables(40, 16, 1e4, scaling, "cpu"), rotary_tables(30, 16, 1e4, scaling, "cpu", offset=10)
    for full, part in zip(whole, rest, strict=True):
        assert torch.equal(part, full[10:])


def test_linear_scaling_divides_positions():
    scaled, plain_ = rotary_tables(9, 8, 1e4, {"type": "linear", "factor": 4.0}, "cpu"), rotary_tables(3, 8, 1e4, None, "cpu")
    for a, b in zip(scaled, plain_, strict=True):
        torch.testing.assert_close(a[::4], b)


def test_llama3_scaling_is_that_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=131072, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    for scaling in (LLAMA3, SimpleNamespace(**LLAMA3)):
        cos, sin = rotary_tables(2, 128, 500000.0, scaling, "cpu")
        torch.testing.assert_close(cos[1].double(), frequencies.double().cos(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(sin[1].double(), frequencies.double().sin(), rtol=1e-5, atol=1e-7)


def test_under_torch_compile():
    x = randn(5, 2, 3, 8).float().requires_grad_()
    cos, sin = tables(x.shape)
    got, expected = torch.compile(rotary, backend="aot_eager", fullgraph=True)(x, cos, sin), rotary(x, cos, sin)
    torch.testing.assert_close(got, expected)
    grad = randn(5, 2, 3, 8, seed=1).float()
    torch.testing.assert_close(torch.autograd.grad(got, x, grad), torch.autograd.grad(expected, x, grad))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="even head_dim, not 7"):
        rotary_tables(4, 7, 1e4, None, "cpu")
    with pytest.raises(ValueError, match="yarn"):
        rotary_tables(4, 8, 1e4, {"type": "yarn"}, "cpu")
    x, short = torch.ones(5, 2, 3, 8), rotary_tables(4, 8, 1e4, None, "cpu")
    fitting, wide = rotary_tables(5, 8, 1e4, None, "cpu"), rotary_tables(5, 10, 1e4, None, "cpu")
    for tables_, options in ((short, {}), (fitting, dict(offset=1)), (fitting, dict(offset=-1)), (wide, {}),
                             ((fitting[0], short[1]), {})):
        with pytest.raises(ValueError, match=r"\(5, 2, 3, 8\) at offset"):
            rotary(x, *tables_, **options)
    for positions in (torch.zeros(5), torch.zeros(4, dtype=torch.int64), torch.zeros(5, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"need int64 \(5,\) or \(5, 2\)"):
            rotary(x, *fitting, positions=positions)
    for shape in ((5, 2, 33), (5, 32), (0,)):
        with pytest.raises(ValueError, match=r"need \[s, b, 4 d\] for 2 heads and 1 groups; one .* in place is empty"):
            rotary_qkv(torch.ones(shape), 2, 1, *fitting)
    for backend in BACKENDS:
        with pytest.raises((IndexError, RuntimeError)):
            rotary(x, *fitting, positions=torch.tensor([0, 1, 2, 3, 5]), backend=backend)
        with pytest.raises((IndexError, RuntimeError)):
            rotary(x, *fitting, positions=torch.tensor([0, 1, 2, 3, -1]), backend=backend)
