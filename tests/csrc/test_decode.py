"""The torch side of the decoding kernel: registration, torch.compile, determinism, what is not read, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megalm.config import validate
from megalm.engine.sequential import SequentialModel
from megalm.model import layers
from megalm.model.cache import KeyValueCache
from megalm.ops.decode import decode
from megalm.ops.kernels import decode as kernels
from megalm.ops.kernels.decode import attention_decode
from megalm.ops.registry import REGISTRY
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.plan import make_plan
from megalm.tools.kernel_cases.accuracy import poisoned, randn


def tensors(s=150, queries=2, batch=2, heads=4, groups=2, dim=64, dtype=torch.bfloat16):
    return [randn(*shape, seed=seed).to(dtype) for seed, shape in enumerate(
        [(queries, batch, heads, dim), (s, batch, groups, dim), (s, batch, groups, dim)])]


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_registration(shim):
    q, k, v = tensors()
    for args in ((lengths(150, 3), None), (None, None)):
        torch.library.opcheck(attention_decode, (q, k, v, *args, None, None, -1, 0.125, 0.0))
    pool = k.view(-1, 2, 64)[:288].unflatten(0, (-1, 16))
    table = torch.arange(18, dtype=torch.int32).view(2, 9)
    torch.library.opcheck(attention_decode, (q, pool, pool, lengths(70, 3), table, torch.ones(4), torch.ones(4), 8, 0.125, 2.0))


def test_no_graph_break(shim):
    q, k, v = tensors(dtype=torch.float16)

    def call(q, k, v, n):
        return decode(q, k, v, n, backend="megalm", return_lse=True)

    got = torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v, lengths(150, 40))
    for a, b in zip(got, call(q, k, v, lengths(150, 40)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_bits_every_time_and_in_every_order(shim):
    q, k, v = tensors(700)
    found = []
    for order in (0, 1, 7):
        shim.set_order(order)
        found.append(decode(q, k, v, lengths(700, 95), backend="megalm", return_lse=True))
    shim.set_order(0)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_query_gets_the_same_whether_it_comes_alone_or_with_others(shim):
    """Speculative decoding verifies several tokens at once: each must see what it would have seen alone."""
    q, k, v = tensors(90, queries=5)
    together = decode(q, k, v, lengths(90, 33), backend="megalm")
    for j in range(5):
        alone = decode(q[j:j + 1], k, v, lengths(86 + j, 29 + j), backend="megalm")
        torch.testing.assert_close(together[j:j + 1], alone, rtol=1e-2, atol=1e-3)


def test_pages_give_the_bits_of_a_cache_in_one_piece(shim):
    q, k, v = tensors(160)
    pools = [x.unflatten(0, (10, 16)).permute(2, 0, 1, 3, 4).flatten(0, 1) for x in (k, v)]   # [20, 16, G, d]
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    n = lengths(160, 77)
    assert torch.equal(decode(q, *pools, n, table=table, backend="megalm"), decode(q, k, v, n, backend="megalm"))


@pytest.mark.parametrize("left", [-1, 20])
def test_what_no_query_sees_is_not_read(shim, left):
    """Not a key before the window nor one beyond a length, nor the table's entries for them."""
    q, k, v = tensors(160)
    pools = [x.unflatten(0, (10, 16)).permute(2, 0, 1, 3, 4).flatten(0, 1).clone() for x in (k, v)]
    table, n = torch.arange(20, dtype=torch.int32).view(2, 10), lengths(130, 77)
    expected = decode(q, *pools, n, table=table, left=left, backend="megalm")
    for sequence, length in enumerate((130, 77)):
        for token in range(160):
            if token >= length or left >= 0 and token < length - 2 - left:
                for pool in pools:
                    pool[sequence * 10 + token // 16, token % 16] = torch.nan
        first = max(0, length - 2 - left) // 16 if left >= 0 else 0
        table[sequence, :first], table[sequence, -(-length // 16):] = 1 << 30, -(1 << 30)
    with poisoned():
        got = decode(q, *pools, n, table=table, left=left, backend="megalm")
    assert torch.equal(got, expected) and expected.isfinite().all()


@pytest.mark.parametrize("backend", ["megalm", "torch", "reference"])
def test_lengths_out_of_bounds_are_no_accesses_out_of_bounds(shim, backend):
    q, k, v = tensors(40)
    options = {"backend": backend} if backend == "torch" else {"backend": backend, "slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}
    for left in (-1, 9):
        out = decode(q, k, v, lengths(1000, -7), left=left, **options)
        assert torch.equal(out[:, :1], decode(q, k, v, lengths(40, 0), left=left, **options)[:, :1]) and not out[:, 1].any()


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4)])
def test_nothing_to_do(shim, shape):
    q, k, v = torch.zeros(*shape, 64).bfloat16(), *(torch.zeros(9, shape[1], 2, 64).bfloat16() for _ in range(2))
    assert decode(q, k, v, backend="megalm").shape == (*shape, 64)


def test_a_cache_without_room_gives_zeros(shim):
    q, k, v = tensors(0)
    out, lse = decode(q, k, v, sinks=torch.arange(4.0), return_lse=True, backend="megalm")
    assert not out.any() and (lse == torch.arange(4.0)[None, :, None]).all()
    assert (decode(q, k, v, return_lse=True, backend="megalm")[1] == -torch.inf).all()


def test_strides(shim):
    """A cache as the model keeps it, [b, G, s, d] seen as [s, b, G, d], and views of one allocation for more tokens."""
    q, k, v = tensors(64)
    kept = [torch.full((2, 2, 100, 64), torch.nan, dtype=x.dtype) for x in (k, v)]
    for store, x in zip(kept, (k, v), strict=True):
        store[:, :, :64] = x.permute(1, 2, 0, 3)
    views = [store[:, :, :64].permute(2, 0, 1, 3) for store in kept]
    expected = decode(q, k, v, backend="megalm")
    assert torch.equal(decode(q, *views, backend="megalm"), expected)
    wide = torch.zeros(2, 2, 4, 68, dtype=q.dtype)
    wide[..., :64] = q
    assert torch.equal(decode(wide[..., :64], k, v, backend="megalm"), expected)   # rows that are not 16 bytes apart


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.inference_mode()
def test_a_model_s_steps_go_through_it(shim, monkeypatch, positions):
    """Two sequences of unequal lengths in bf16: near what torch gives, and by the kernel."""
    config = validate({
        "model": {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 96,
                  "vocab_size": 64, "position_embedding": positions, "init_std": 0.1},
        "batch": {"micro": 1, "global": 1}, "precision": {"dtype": "bf16"}, "optimizer": {"lr": 1e-3},
        "tokenizer": {"type": "bytes"}, "data": {"train": [{"path": "none"}]}, "train": {"dir": "none", "steps": 1},
    })  # fmt: skip
    model = SequentialModel(layers(config, make_plan(config, 1), TensorParallel(), StepContext(1)), None).eval()
    tokens, found, calls = torch.randint(64, (2, 80), generator=torch.Generator().manual_seed(1)), {}, []
    count = kernels._DECODE.count
    monkeypatch.setattr(kernels._DECODE, "count", lambda *arguments, **values: calls.append(0) or count(*arguments, **values))
    for backend in ("megalm", "torch"):
        monkeypatch.setitem(REGISTRY.table["measured"]["cpu"], "decode", [backend])
        REGISTRY.chosen.clear()
        cache, outputs, at = KeyValueCache(2, 96, torch.device("cpu")), [], 0
        for counts in ([70, 33], [1, 1], [4, 4], [1, 1]):
            with cache.adding(model, counts):
                outputs.append(model.outputs(tokens[:, at:at + max(counts)])[0])
            at += max(counts)
        found[backend] = torch.cat([outputs[0][:33], *outputs[1:]]).float()
    assert len(calls) == 3 * 2   # steps times layers
    torch.testing.assert_close(found["megalm"], found["torch"], rtol=0.05, atol=0.05)


def test_what_is_refused(shim):
    q, k, v = tensors()
    n = lengths(3, 4)
    with pytest.raises(ValueError, match="its kernels take bf16 and fp16 with 64, 80, "):
        decode(q.float(), k.float(), v.float(), n, backend="megalm")
    with pytest.raises(ValueError, match="its kernels take bf16 and fp16 with 64, 80, "):
        decode(q[..., :48], k[..., :48], v[..., :48], n, backend="megalm")
    with pytest.raises(ValueError, match="v is torch.float16 on cpu; it must be torch.bfloat16"):
        decode(q, k, v.half(), n, backend="megalm")
