"""The torch side of the dropout kernels: the masks of ops/random.py bit by bit, registration, autograd formula, torch.compile."""

from __future__ import annotations

import subprocess

import pytest
import torch
from torch._dynamo.utils import counters

from megalm.ops.dropout import bias_dropout_add
from megalm.ops.kernels.dropout import _FORWARD, dropout_backward, dropout_forward
from megalm.ops.random import MLP_OUTPUT, DropoutKey, keep_mask
from megalm.tools.build_kernels import CSRC, GXX_FLAGS
from megalm.tools.kernel_cases.accuracy import randn
from tests.ops.test_random import VECTORS, words

KEY = DropoutKey(seed=2**40 + 5, step=2**33 + 7, layer=3, op=MLP_OUTPUT)
SAMPLES = torch.tensor([4, 2**33 + 1, 2])
RAW = (SAMPLES, KEY.seed, torch.tensor(KEY.step), torch.tensor(KEY.layer), KEY.op)


def run(x, bias, residual, start=0, full=None, samples=SAMPLES, key=KEY, probability=0.3, backend="megalm"):
    extents = [(start, start + x.shape[0], full or start + x.shape[0]), (0, x.shape[2], x.shape[2])]
    return bias_dropout_add(x, bias, residual, key, samples, extents, probability, backend=backend)


def tensors(*shape, dtype=torch.float32):
    made = randn(*shape), randn(shape[-1], seed=1), randn(*shape, seed=2)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def test_philox_reproduces_published_vectors(shim_library, tmp_path):
    """The device function itself, with every word of counter and key."""
    calls = []
    for counter, key, _ in VECTORS:
        arguments = [f"0x{word:08x}u" for word in (*words(counter), *words(key))]
        calls.append(f"show(philox4x32({{{', '.join(arguments[:4])}}}, {', '.join(arguments[4:])}));")
    source = tmp_path / "philox.cpp"
    source.write_text("""#include "common/philox.cuh"
        #include <cstdio>
        void show(Words w) { std::printf("%08x %08x %08x %08x\\n", w.x, w.y, w.z, w.w); }
        int main() {""" + "\n".join(calls) + "}")
    subprocess.run(["g++", *GXX_FLAGS, f"-I{CSRC}", str(source), "-o", str(tmp_path / "philox")], check=True)
    printed = subprocess.run([str(tmp_path / "philox")], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [expected for _, _, expected in VECTORS]


def test_an_element_is_kept_where_its_word_is_the_threshold(shim):
    """Block 0 of sample 0 under the key 0, whose words are the first published vector."""
    x, out, samples = torch.ones(1, 1, 4), torch.empty(1, 1, 4), torch.zeros(1, dtype=torch.int64)
    for lane, word in enumerate(words(VECTORS[0][2])):
        for threshold, kept in ((word, True), (word + 1, False)):
            _FORWARD(x.device, x=x, bias=None, residual=None, samples=samples, out=out, rows=1, width=4, batch=1, start=0,
                     scale=1.0, key0=0, key1=0, threshold=threshold, dtype=0)
            assert bool(out[0, 0, lane]) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [8, 12, 5, 33, 1, 264])
def test_masks_are_those_of_the_definition(shim, width, dtype):
    """Of ones, forward and backward, whatever the phase of a row in its blocks of four; also far beyond 32 bits of places."""
    for start in (0, 3, 2**40 + 1):
        for probability in (0.3, 2.0**-32, 1 - 2.0**-20):
            x = torch.ones(5, 3, width, dtype=dtype, requires_grad=True)
            out = run(x, None, None, start, probability=probability)
            grad, = torch.autograd.grad(out.sum(), x)
            extents = [(start, start + 5, start + 5), (0, width, width)]
            kept = keep_mask(KEY, SAMPLES, extents, probability).transpose(0, 1)
            assert torch.equal(out != 0, kept) and torch.equal(grad, out)


@pytest.mark.parametrize("width", [16, 7])
def test_a_rank_of_a_split_sequence_drops_its_slice_of_the_whole(shim, width):
    x, bias, residual = (tensor.detach() for tensor in tensors(12, 3, width))
    whole = run(x, bias, residual)
    for ranks in (2, 3, 4):
        length = 12 // ranks
        for rank in range(ranks):
            mine = slice(rank * length, (rank + 1) * length)
            got = run(x[mine], bias, residual[mine], rank * length, 12)
            assert torch.equal(got, whole[mine])
    one = run(x[:, 1:2], bias, residual[:, 1:2], samples=SAMPLES[1:2])
    assert torch.equal(one, whole[:, 1:2])


def test_registration(shim):
    x, bias, residual = (tensor.detach() for tensor in tensors(4, 3, 16))
    for shift, other in ((bias, residual), (None, residual), (bias, None), (None, None)):
        torch.library.opcheck(dropout_forward, (x, shift, other, *RAW, 5, 0.3))
    for with_bias in (False, True):
        torch.library.opcheck(dropout_backward, (x, *RAW, 5, 0.3, with_bias))


@pytest.mark.parametrize("width", [6, 3])
@pytest.mark.parametrize("probability", [0.3, 0.0])
def test_autograd_formula(shim, width, probability):
    x, bias, residual = tensors(4, 3, width, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: run(*t, probability=probability), (x, bias, residual))
    assert torch.autograd.gradcheck(lambda x, r: run(x, None, r, probability=probability), (x, residual))
    assert torch.autograd.gradcheck(lambda x: run(x, None, None, probability=probability), (x,))


def test_one_graph_serves_all_steps_and_layers(shim):
    torch._dynamo.reset()
    counters.clear()
    inputs = tensors(4, 3, 16)

    def step_of(x, bias, residual, step, layer):
        return run(x, bias, residual, key=KEY._replace(step=step, layer=layer))

    compiled = torch.compile(step_of, backend="aot_eager", fullgraph=True)
    for step, layer in ((0, 0), (1, 0), (5, 2)):
        got = compiled(*inputs, torch.tensor(step), torch.tensor(layer))
        expected = step_of(*inputs, step, layer)
        assert torch.equal(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), inputs) for out in (got, expected)))
    assert counters["stats"]["unique_graphs"] == 1


def test_nothing_is_stored_for_the_backward_pass(shim):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = run(*tensors(4, 3, 16))
    assert out.requires_grad and not saved


def test_the_residuals_gradient_is_the_gradient_itself(shim):
    x, bias, residual = tensors(4, 3, 16)
    grad = randn(4, 3, 16, seed=3).float()
    got = torch.autograd.grad(run(x, bias, residual), residual, grad)[0]
    assert got.data_ptr() == grad.data_ptr()


def test_strides_and_offsets_change_nothing(shim):
    whole = randn(6, 3, 40).float()
    bias = randn(32, seed=1).float()
    for x in (whole[..., 8:], whole[..., 1:33], whole[:4, :, :32], whole.transpose(0, 2)[:32].transpose(0, 2), whole[::2, :, 8:]):
        out = run(x, bias, x)
        assert torch.equal(out, run(x.contiguous(), bias, x.contiguous()))
        assert torch.equal(out, run(x, torch.stack([bias, bias], 1)[:, 0], x))


def test_empty(shim):
    x, bias, residual = tensors(0, 3, 8)
    out = run(x, bias, residual)
    grads = torch.autograd.grad(out.sum(), (x, bias, residual))
    assert out.shape == (0, 3, 8) and torch.equal(grads[1], torch.zeros(8))


def test_what_is_refused(shim):
    x, bias, residual = (tensor.detach() for tensor in tensors(4, 3, 8))
    with pytest.raises(ValueError, match=r"bias is torch.bfloat16 on cpu; it must be torch.float32"):
        run(x, bias.bfloat16(), residual)
    with pytest.raises(ValueError, match=r"the residual must have its shape, the bias be \[8\]"):
        run(x, bias, residual[:2])
    with pytest.raises(ValueError, match=r"the residual must have its shape, the bias be \[8\]"):
        run(x, bias[:4], residual)
    with pytest.raises(ValueError, match=r"extent \(-1, 3, 3\)"):
        run(x, bias, residual, -1)
    with pytest.raises(ValueError, match=r"must be \[s, b, h\] and have b samples, not \(2,\)"):
        dropout_forward(x, None, None, SAMPLES[:2], *RAW[1:], 0, 0.3)
    with pytest.raises(RuntimeError, match="megalm dropout_forward: invalid argument"):
        dropout_forward(x, None, None, *RAW, -1, 0.3)
