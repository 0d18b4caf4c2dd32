"""What was saved under one layout is bitwise there after loading under another."""
from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch

from megalm.checkpoint import CheckpointError, Fragment, find, load, pieces, read_weights
from tests.checkpoint.fakes import ADAM, SMALL, Crew, Engine, draw, engines, expected, save_all

LAYOUTS = [dict(tp=1), dict(tp=2), dict(tp=4, dp=2), dict(pp=2, dp=3), dict(dp=5), dict(tp=2, pp=2, dp=2), dict(tp=3, pp=3, dp=2),
           dict(tp=2, dp=2, sharded=False), dict(tp=8)]


def load_all(folder, ranks: list[Engine], **more) -> list:
    return Crew(len(ranks)).run(lambda groups: load(folder, ranks[groups.rank], groups, **more))


def wrong(ranks: list[Engine], values) -> list[str]:
    """Fragments that don't hold what they must, bit for bit."""
    held = [fragment for engine in ranks for fragment in engine.held]
    return [str(fragment) for fragment in held if not torch.equal(fragment.tensor, expected(fragment, values))]


def succeed(results: list) -> list:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("before", LAYOUTS, ids=str)
def test_every_layout_loads_under_every_other(before, tmp_path):
    values = draw(SMALL)
    counters = {"optimizer_step": 7, "scale": 0.1}
    sources = engines(SMALL, values, seed=1, **before)
    for engine in sources:
        engine.count = counters
    succeed(save_all(tmp_path, 9, sources))
    for seed, after in enumerate(LAYOUTS):
        targets = engines(SMALL, None, seed=10 + seed, **after)
        assert all(notes == [] for notes in succeed(load_all(tmp_path, targets)))
        assert wrong(targets, values) == []
        assert all(engine.refreshed == counters for engine in targets)


@pytest.mark.parametrize("seed", range(25))
def test_random_parts_and_random_layouts(seed, tmp_path):
    rng = random.Random(seed)
    parts = {}
    for index in range(rng.randint(1, 8)):
        shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3)))
        parts[f"part.{index}"] = (shape, rng.choice([None, *range(len(shape))]))
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64])
    values = draw(parts, seed=seed, dtype=dtype)

    def layout():
        return dict(tp=rng.randint(1, 3), pp=rng.randint(1, 2), dp=rng.randint(1, 4), seed=rng.random(), dtype=dtype)

    # A tensor shorter than tp has nothing on some ranks, which an engine never makes: those fragments have no elements.
    succeed(save_all(tmp_path, 1, engines(parts, values, **layout())))
    for _ in range(3):
        targets = engines(parts, None, **layout())
        succeed(load_all(tmp_path, targets))
        assert wrong(targets, values) == []


def test_a_part_that_was_whole_loads_as_shards_and_back(tmp_path):
    """Keys and values are whole on every rank when there are fewer groups than tp ranks, and sharded otherwise."""
    whole = {"key": ((4, 6), None)}
    for name, dim in (("rows", 0), ("columns", 1)):
        cut = {"key": ((4, 6), dim)}
        values = draw(whole)
        succeed(save_all(tmp_path / name, 1, engines(whole, values, tp=2, dp=3)))
        targets = engines(cut, None, tp=2, dp=2, seed=5)
        succeed(load_all(tmp_path / name, targets))
        assert wrong(targets, values) == []
        succeed(save_all(tmp_path / name, 2, targets))
        back = engines(whole, None, tp=2, dp=1)
        succeed(load_all(tmp_path / name, back))
        assert wrong(back, values) == []


@pytest.mark.parametrize("rows_before, rows_after", [(64, 96), (96, 64)])
def test_vocabulary_padded_to_another_size(rows_before, rows_after, tmp_path):
    """Common rows move, rows that are new keep their initial value."""
    def parts(rows):
        return {"embedding.word.weight": ((rows, 6), 0), "head.weight": ((rows, 6), 0), "final_norm.weight": ((6,), None)}

    values = draw(parts(rows_before))
    succeed(save_all(tmp_path, 1, engines(parts(rows_before), values, tp=2, dp=3)))
    initial = draw(parts(rows_after), seed=99)
    targets = engines(parts(rows_after), initial, tp=4, dp=2, seed=3)
    succeed(load_all(tmp_path, targets))
    common = min(rows_before, rows_after)
    for key, tensor in values.items():
        initial[key][:common] = tensor[:common]
    assert wrong(targets, initial) == []


def test_another_shape_is_an_error_that_names_both(tmp_path):
    succeed(save_all(tmp_path, 1, engines({"up": ((8, 4), 0)}, draw({"up": ((8, 4), 0)}))))
    results = load_all(tmp_path, engines({"up": ((16, 4), 0)}, None, tp=2))
    assert all(isinstance(result, CheckpointError) for result in results)
    assert "master of up has shape [8, 4] in the checkpoint and [16, 4] here" in str(results[0])


def test_a_missing_part_is_named_on_every_rank(tmp_path):
    parts = dict(list(SMALL.items())[:4])
    succeed(save_all(tmp_path, 1, engines(parts, draw(parts))))
    results = load_all(tmp_path, engines({**parts, "new": ((2,), None)}, None, pp=2))
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "rank 1: master of new isn't in the checkpoint, which holds exp_avg, exp_avg_sq, master" in str(result)


def test_weights_only_leaves_moments_and_counters_alone(tmp_path):
    values = draw(SMALL)
    sources = engines(SMALL, values, dp=2)
    for engine in sources:
        engine.count = {"optimizer_step": 7}
    succeed(save_all(tmp_path, 5, sources))
    initial = draw(SMALL, seed=4)
    target = engines(SMALL, initial)[0]
    target.count = {"optimizer_step": 0}
    succeed(load_all(tmp_path, [target], weights_only=True))
    mixed = {key: values[key] if key[1] == "master" else initial[key] for key in values}
    assert wrong([target], mixed) == [] and target.refreshed == {"optimizer_step": 0}


def test_another_optimizer_needs_allow_changes(tmp_path):
    values = draw(SMALL)
    succeed(save_all(tmp_path, 5, engines(SMALL, values)))
    roles = ("master", "momentum")
    initial = draw(SMALL, roles=roles, seed=4)
    target = engines(SMALL, initial, roles=roles)
    refused = load_all(tmp_path, target)[0]
    assert isinstance(refused, CheckpointError) and "momentum of embedding.word.weight isn't in the checkpoint" in str(refused)
    [note] = succeed(load_all(tmp_path, target, allow_changes=True))[0]
    assert "momentum starts anew" in note
    assert wrong(target, {key: values[key] if key in values else initial[key] for key in initial}) == []


def test_weights_are_taken_from_masters_and_masters_from_weights(tmp_path):
    """An fp32 run goes on as a mixed one and back; where both roles are stored, the masters count."""
    parts = {"up": ((8, 6), 0)}
    values = draw(parts, roles=("weight",))
    succeed(save_all(tmp_path, 1, engines(parts, values, roles=("weight",), tp=2)))
    target = engines(parts, None, roles=("master",))
    succeed(load_all(tmp_path, target))
    assert torch.equal(target[0].held[0].tensor.view(8, 6), values["up", "weight"])
    both = {**values, ("up", "master"): values["up", "weight"] + 1}
    succeed(save_all(tmp_path, 2, engines(parts, both, roles=("weight", "master"))))
    target = engines(parts, None, roles=("weight",), dtype=torch.bfloat16)
    succeed(load_all(tmp_path, target))
    assert torch.equal(target[0].held[0].tensor.view(8, 6), both["up", "master"].bfloat16())


def test_dtypes_of_different_sizes_share_a_file(tmp_path):
    """Odd counts of two-byte elements before four- and eight-byte ones: everything stays aligned and exact."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32]
    held = [Fragment(f"p{index}", "weight", (3,), None, 0, 3, 0, torch.randn(3).to(dtype)) for index, dtype in enumerate(dtypes)]
    succeed(save_all(tmp_path, 1, [Engine(held)]))
    content = (find(tmp_path) / "rank_00000.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8: 8 + length])
    for fragment in held:
        assert (8 + length + header[f"weight/{fragment.part}"]["data_offsets"][0]) % fragment.tensor.element_size() == 0
    weights = read_weights(tmp_path)
    for fragment in held:
        assert torch.equal(weights[fragment.part], fragment.tensor) and weights[fragment.part].dtype == fragment.tensor.dtype


def test_read_weights_gives_full_tensors(tmp_path):
    values = draw(SMALL)
    succeed(save_all(tmp_path, 3, engines(SMALL, values, tp=3, pp=2, dp=2)))
    weights = read_weights(tmp_path)
    assert set(weights) == set(SMALL) and len(weights) == len(SMALL)
    for part, (shape, _) in SMALL.items():
        assert weights.shape(part) == shape
        assert torch.equal(weights[part], values[part, "master"])
    with pytest.raises(KeyError):
        weights["nothing"]


def test_pieces_of_different_steps_are_refused(tmp_path):
    ranks = engines({"up": ((8, 4), 0)}, draw({"up": ((8, 4), 0)}), tp=2)
    other = engines({"up": ((8, 4), 0)}, draw({"up": ((8, 4), 0)}), tp=2, step=8)
    succeed(save_all(tmp_path, 1, [ranks[0], other[1]]))
    result = load_all(tmp_path, engines({"up": ((8, 4), 0)}, None))[0]
    assert isinstance(result, CheckpointError) and "exp_avg of up: its pieces are of different optimizer steps" in str(result)


def test_the_first_bytes_of_a_stored_nan_survive(tmp_path):
    """Bitwise means bitwise: payloads of NaN, infinities, negative zero."""
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1, -(1 << 31), 0x7F800000, 1], dtype=torch.int32)
    held = Fragment("odd", "master", (2, 3), None, 0, 2, 0, bits.view(torch.float32).clone())
    succeed(save_all(tmp_path, 1, [Engine([held])]))
    assert torch.equal(read_weights(tmp_path)["odd"].view(-1).view(torch.int32), bits)


def test_columns_move_as_slabs_and_not_row_by_row(tmp_path, monkeypatch):
    """From tp 2 x dp 3 to tp 4: a handful of strided copies for each block, where a loop over rows would make thousands."""
    parts = {f"layers.{index}.mlp.down.weight": ((1024, 512), 1) for index in range(4)}
    values = draw(parts, roles=("master",))
    succeed(save_all(tmp_path, 1, engines(parts, values, tp=2, dp=3, roles=("master",))))
    targets, copies, view = engines(parts, None, tp=4, roles=("master",)), [], pieces._box_view
    monkeypatch.setattr(pieces, "_box_view", lambda target, box: (copies.append(box), view(target, box))[1])
    succeed(load_all(tmp_path, targets))
    assert wrong(targets, values) == []
    assert sum(math.prod(high - low for low, high in box) for box in copies) == 4 * 1024 * 512 and len(copies) < 150, len(copies)


def test_layouts_differ():
    """The table above would prove nothing if its layouts cut alike."""
    def fragments(**layout):
        return [fragment for engine in engines(SMALL, draw(SMALL), **layout) for fragment in engine.held]

    cuts = [tuple((held.part, held.low, held.start, held.count) for held in fragments(**layout)) for layout in LAYOUTS]
    assert all(one != other for one, other in itertools.combinations(cuts, 2))
    assert any(held.dim == 1 and held.start % 5 for held in fragments(dp=20)), "no column shard starts in the middle of a row"
    assert tuple(dict.fromkeys(held.role for held in fragments())) == ADAM
