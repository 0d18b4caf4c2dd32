"""Real engines: what any layout saved, any other loads, bit for bit, with no conversion between."""
from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest

import megalm.checkpoint
from megalm import checkpoint
from megalm.config import load
from megalm.engine.engine import build
from megalm.model import layers
from megalm.parallel.groups import start
from megalm.parallel.random import StepContext
from megalm.parallel.world import connect
from megalm.plan import make_plan
from tests import dist, training

LAYOUTS = {
    "one": (1, ["parallel.zero_stage=0"]),
    "tp4": (4, ["parallel.tp=4", "parallel.sequence_parallel=true"]),  # more than the model's two groups of keys and values
    "tp2-pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "pp2-dp2": (4, ["parallel.pp=2", "parallel.dp=2"]),
    "dp2-zero2": (2, ["parallel.dp=2", "parallel.zero_stage=2"]),
    "dp2-zero3-wide": (2, ["parallel.dp=2", "parallel.zero_stage=3", "model.vocab_multiple=512"]),  # 384 rows become 512
}
ROLES = ("master", "exp_avg", "exp_avg_sq", "ema")


def reader():
    """The reader of README.md, which knows nothing of megalm."""
    text = (Path(megalm.checkpoint.__file__).parent / "README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), names)
    return names["read"]


def _move(rank: int, world: int, path: str, overrides: list[str], sources: dict[str, Path], target: Path) -> None:
    """Load each checkpoint into one engine and save it again as this layout has it."""
    config = load(path, overrides)
    plan = make_plan(config, world, 257)
    groups = start(plan, world=connect())
    context = StepContext(config.train.seed)
    engine = build(config, plan, groups, context, layers(config, plan, groups.tp, context, groups.device))
    for name, source in sources.items():
        manifest = checkpoint.read_manifest(source)
        checkpoint.load(source, engine, groups)
        with contextlib.suppress(FileExistsError):
            (target / name).mkdir(parents=True)
        checkpoint.save(target / name, manifest["step"], manifest["consumed_samples"], engine, groups, config, plan)
    groups.leave()


@pytest.mark.parametrize("tied, dtype, names", [
    (True, "fp32", list(LAYOUTS)), (False, "bf16", ["tp4", "tp2-pp2", "dp2-zero3-wide"])], ids=str)
def test_every_pair_of_layouts_moves_bitwise(tied, dtype, names, tmp_path):
    """Masters, both moments and the moving average, after two steps: 30 pairs of a tied model, 6 of an untied one in bf16."""
    model = {**training.config(tmp_path)["model"], "tie_embeddings": tied}
    path = training.write_config(tmp_path, model=model, optimizer={"ema_decay": 0.5})
    read, saved = reader(), {}
    for name in names:
        world, overrides = LAYOUTS[name]
        overrides = [*overrides, f"precision.dtype={dtype}", f"train.dir={tmp_path / 'runs' / name}", "train.stop_at=2"]
        assert training.start(world, path, *overrides) == [(0, "")] * world
        saved[name] = checkpoint.find(tmp_path / "runs" / name)
    full = {(name, role): read(folder, role) for name, folder in saved.items() for role in ROLES}
    for name in names:
        world, overrides = LAYOUTS[name]
        others = {other: folder for other, folder in saved.items() if other != name}
        dist.run(_move, world, str(path), [*overrides, f"precision.dtype={dtype}"], others, tmp_path / "moved" / name)
        for other, role in ((other, role) for other in others for role in ROLES):
            moved, expected = read(checkpoint.find(tmp_path / "moved" / name / other), role), full[other, role]
            assert moved.keys() == expected.keys() and len(moved) > 15
            for part in moved:
                rows = min(len(moved[part]), len(expected[part]))  # the padding of the vocabulary apart, all of them
                one, two = (side[part][:rows].view("<u4") for side in (moved, expected))
                assert np.array_equal(one, two), (other, name, role, part)
