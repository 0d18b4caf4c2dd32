"""Parallel linear layers and embedding against the whole weight on one rank, forward and every gradient, in fp32 and bf16."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalm.parallel.collectives import copy_to_tp, enter, gather_sequence, leave, reduce_from_tp, reduce_scatter_sequence
from megalm.parallel.embedding import VocabParallelEmbedding
from megalm.parallel.groups import TensorParallel
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.sharding import Kind, declared, initialise, part_slices
from tests import dist as ranks

S, B, H, OUT, V = 8, 2, 12, 16, 32


def _tp(rank: int, size: int, sequence: bool) -> TensorParallel:
    return TensorParallel(rank, size, dist.group.WORLD if size > 1 else None, sequence, complete_in_backward=True)


def _block(tp: TensorParallel, dtype: torch.dtype) -> tuple:
    """embedding -> column (two fused parts) -> gated -> row, with weights from their names alone."""
    options = dict(std=0.5, tp=tp, dtype=dtype, device=torch.device("cpu"))
    modules = (VocabParallelEmbedding("word", V, H, **options),
               ColumnParallelLinear(["a", "b"], [OUT, OUT], H, bias=True, **options),
               RowParallelLinear("down", H, OUT, bias=True, **options))
    for module in modules:
        initialise(module, seed=7)
        for parameter in module.parameters():
            if declared(parameter).std is None:  # zero biases would hide a bias added tp times
                for part, view in part_slices(parameter, parameter.data):
                    full = torch.linspace(-1, 1, part.full_shape[0])
                    view.copy_(full[part.start:part.stop] if part.dim is not None else full)
    return modules


def _run(tp: TensorParallel, dtype: torch.dtype) -> dict:
    embedding, column, row = _block(tp, dtype)
    tokens = torch.arange(S * B).view(B, S) * 5 % V
    hidden = embedding(tokens)
    a, b = column(hidden).chunk(2, dim=-1)
    out = row(F.gelu(a) * b)
    weight = torch.linspace(-1, 1, S * B * H).view(S, B, H).to(dtype)
    mine = weight[slice(*tp.share(S))] if tp.shards_sequence else weight
    # Without sequence parallelism every rank holds the whole output, so each rank's loss is the whole loss.
    (out * mine).float().sum().backward()
    found = {}
    for module in (embedding, column, row):
        for parameter in module.parameters():
            for part, gradient in part_slices(parameter, parameter.grad):
                found[part.name] = (part, gradient.clone(), declared(parameter).kind)
    return {"hidden": hidden.detach(), "out": out.detach(), "gradients": found}


def run_block(rank: int, world: int, sequence: bool, dtype: torch.dtype) -> dict:
    return _run(_tp(rank, world, sequence), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("size", [2, 4])
def test_block_equals_one_rank(size, sequence, dtype):
    alone = _run(_tp(0, 1, False), dtype)
    together = ranks.run(run_block, size, sequence, dtype)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    for name in ("hidden", "out"):
        whole = torch.cat([one[name] for one in together]) if sequence else together[0][name]
        torch.testing.assert_close(whole, alone[name], **close)
    for name, (_, expected, _) in alone["gradients"].items():
        scale = expected.abs().max()
        for one in together:
            part, gradient, kind = one["gradients"][name]
            own = expected if part.dim is None else expected.narrow(part.dim, part.start, part.stop - part.start)
            torch.testing.assert_close(gradient / scale, own / scale, **close)
            assert (kind is Kind.SHARDED) == (part.dim is not None)


def run_collectives(rank: int, world: int) -> dict:
    tp = _tp(rank, world, True)
    shard = torch.arange(4.0).view(2, 2) + 10 * rank
    results = {}
    for name, op, value in (("copy", copy_to_tp, shard), ("reduce", reduce_from_tp, shard), ("gather", gather_sequence, shard),
                            ("scatter", reduce_scatter_sequence, torch.cat([shard, shard + 1]))):
        x = value.clone().requires_grad_()
        y = op(x, tp)
        y.backward(torch.full_like(y, rank + 1.0))
        results[name] = (y.detach(), x.grad)
    assert torch.equal(enter(shard, tp), gather_sequence(shard, tp))
    wide = torch.cat([shard, shard])
    assert torch.equal(leave(wide, tp), reduce_scatter_sequence(wide, tp))
    return results


def test_collectives_are_conjugate():
    zero, one = ranks.run(run_collectives, 2)
    a, b = torch.arange(4.0).view(2, 2), torch.arange(4.0).view(2, 2) + 10
    assert torch.equal(zero["copy"][0], a) and torch.equal(zero["copy"][1], torch.full((2, 2), 3.0))
    assert torch.equal(one["reduce"][0], a + b) and torch.equal(one["reduce"][1], torch.full((2, 2), 2.0))
    assert torch.equal(one["gather"][0], torch.cat([a, b])) and torch.equal(one["gather"][1], torch.full((2, 2), 3.0))
    assert torch.equal(zero["scatter"][0], a + b) and torch.equal(one["scatter"][0], a + b + 2)
    assert torch.equal(one["scatter"][1], torch.cat([torch.full((2, 2), 1.0), torch.full((2, 2), 2.0)]))


def run_restored(rank: int, world: int) -> bool:
    """The caller's tensors survive: collectives that reduce in place must not write into what they were given."""
    tp = _tp(rank, world, False)
    x = torch.ones(3, requires_grad=True)
    y = x * 1.0
    reduce_from_tp(y, tp)
    return bool(torch.equal(y.detach(), torch.ones(3)))


def test_inputs_are_not_overwritten():
    assert ranks.run(run_restored, 2) == [True, True]
