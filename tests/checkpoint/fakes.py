"""Engines that hold random tensors cut in any way, for ranks that are threads: a checkpoint needs no more to be tested."""
from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import Fragment, save
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.sealed import digest, seal
from megalm.tools._crew import Crew
from megalm.tools._trials import Hasty

Parts = dict[str, tuple[tuple[int, ...], int | None]]
Values = dict[tuple[str, str], Tensor]

ADAM = ("master", "exp_avg", "exp_avg_sq")
SMALL: Parts = {
    "embedding.word.weight": ((64, 12), 0),
    "layers.0.attention.norm.weight": ((12,), None),
    "layers.0.attention.query.weight": ((16, 12), 0),
    "layers.0.attention.key.weight": ((4, 12), None),
    "layers.0.attention.query.bias": ((16,), 0),
    "layers.0.attention.projection.weight": ((12, 16), 1),
    "layers.0.mlp.up.weight": ((40, 12), 0),
    "layers.0.mlp.down.weight": ((12, 40), 1),
    "layers.0.experts.weight": ((3, 8, 5), 1),
    "final_norm.weight": ((12,), None),
    "head.weight": ((64, 12), 0),
}


@dataclass
class Engine:
    held: list[Fragment]
    count: dict[str, Any] = field(default_factory=dict)
    refreshed: dict[str, Any] | None = None

    def fragments(self) -> list[Fragment]:
        return self.held

    def counters(self) -> dict[str, Any]:
        return self.count

    def refresh(self, counters: dict[str, Any]) -> None:
        self.refreshed = counters


def draw(parts: Parts, roles: tuple[str, ...] = ADAM, seed: int = 0, dtype: torch.dtype = torch.float32) -> Values:
    """A full tensor for every part and role."""
    generator = torch.Generator().manual_seed(seed)
    keys = [(part, role) for part in parts for role in roles]
    return {(part, role): torch.randn(parts[part][0], generator=generator).to(dtype) for part, role in keys}


def slab_of(full: Tensor, dim: int | None, low: int, high: int) -> Tensor:
    return (full if dim is None else full.narrow(dim, low, high - low)).reshape(-1)


def engines(parts: Parts, values: Values | None, *, tp: int = 1, pp: int = 1, dp: int = 1, seed: int = 0, sharded: bool = True,
            roles: tuple[str, ...] = ADAM, dtype: torch.dtype = torch.float32, step: int | None = 7) -> list[Engine]:
    """An engine a rank, tp fastest, pp slowest; `values` None: tensors of NaN, to be filled.

    Parts go to stages in turn, embedding.word.weight also to the last one as a copy. Tensors with a dim are cut over tp
    (unevenly where it doesn't divide). `sharded`: the parts of a rank are laid end to end and cut at random places into dp
    pieces, as ZeRO does; else every dp rank holds everything and the first owns it.
    """
    generator = random.Random(seed)
    names = list(parts)
    made: list[Engine] = []
    for stage in range(pp):
        own = [name for index, name in enumerate(names) if index * pp // len(names) == stage]
        tied = pp > 1 and stage == pp - 1 and "embedding.word.weight" in names
        own += ["embedding.word.weight"] if tied and "embedding.word.weight" not in own else []
        total = sum(math.prod(parts[name][0]) for name in own)
        cuts = sorted(generator.randint(0, total) for _ in range(dp - 1))
        for replica in range(dp):
            window = ([0, *cuts][replica], [*cuts, total][replica]) if sharded else (0, total)
            for rank in range(tp):
                owned = {name for name in own if (parts[name][1] is not None or rank == 0) and (sharded or replica == 0)}
                owned -= {"embedding.word.weight"} if tied else set()
                made.append(Engine(_held(parts, own, owned, values, roles, dtype, step, (rank, tp), window)))
    return made


def _held(parts: Parts, own: list[str], owned: set[str], values: Values | None, roles: tuple[str, ...], dtype: torch.dtype,
          step: int | None, place: tuple[int, int], window: tuple[int, int]) -> list[Fragment]:
    rank, tp = place
    held, offset = [], 0
    for name in own:
        shape, dim = parts[name]
        low, high = (0, shape[0]) if dim is None else (shape[dim] * rank // tp, shape[dim] * (rank + 1) // tp)
        size = math.prod(shape) if dim is None else math.prod(shape) // shape[dim] * (high - low)
        first, stop = max(window[0] - offset, 0), min(window[1] - offset, size)
        for role in roles if first < stop else ():
            tensor = torch.full((stop - first,), math.nan, dtype=dtype)
            if values is not None:
                tensor = slab_of(values[name, role], dim, low, high)[first:stop].to(dtype).clone()
            at = None if role == "master" else step
            held.append(Fragment(name, role, shape, dim, low, high, first, tensor, name in owned, at))
        offset += math.prod(shape)  # as if whole, so that every tp rank's window ends somewhere in the same part
    return held


def expected(fragment: Fragment, values: Values) -> Tensor:
    """What a fragment must hold."""
    slab = slab_of(values[fragment.part, fragment.role], fragment.dim, fragment.low, fragment.high)
    return slab[fragment.start: fragment.start + fragment.count].to(fragment.tensor.dtype)


def settings(keep: int = 3, allow_changes: bool = False, keep_every: int = 0, keep_best: int = 0,
             remote: str | None = None, max_failures: int = 1, **more: Any) -> SimpleNamespace:
    """As much of a Config as saving needs."""
    content = {"model": {"hidden_size": 12}, "train": {"seed": 1}, "optimizer": {"lr": 0.1}, "data": {"train": [{"path": "a"}]}}
    section = SimpleNamespace(keep=keep, keep_every=keep_every, keep_best=keep_best, allow_changes=allow_changes, remote=remote,
                              max_failures=max_failures)
    return SimpleNamespace(checkpoint=section, model_dump=lambda mode: json.loads(json.dumps({**content, **more})))


def plan(tp: int = 1, pp: int = 1, dp: int = 1, **more: Any) -> SimpleNamespace:
    numbers = {"tp": tp, "pp": pp, "dp": dp, "zero_stage": 1, "sequence_parallel": False, "global_batch": 8, "vocab_size": 60,
               "padded_vocab_size": 64}
    numbers |= more
    return SimpleNamespace(**numbers, to_dict=lambda: dict(numbers))


def save_all(folder: Path, step: int, ranks: list[Engine], disks: Sequence[Disk] = (), **more: Any) -> list[Any]:
    """Save with every rank; each rank's path, or its exception."""
    rules = {name: more.pop(name) for name in ("keep", "keep_every", "keep_best") if name in more}
    consumed = more.pop("consumed", 8 * step)
    disks = disks or [Hasty() for _ in ranks]
    return Crew(len(ranks)).run(lambda groups: save(
        folder, step, consumed, ranks[groups.rank], groups, settings(**rules), plan(), disk=disks[groups.rank], **more))


def plant(checkpoint: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change one of a checkpoint's JSON files as somebody would who knows the format: every hash and size is right again."""
    files = {}
    for file in (name, "checkpoint.json"):
        document = json.loads((checkpoint / file).read_text())
        sealed = document.pop("xxh3", None)
        if file == name:
            change(document)
        document |= {"files": {**document["files"], **files}} if "files" in document else {}
        content = seal(document) if sealed else json.dumps(document).encode()
        (checkpoint / file).write_bytes(content)
        files[file] = {"bytes": len(content), "xxh3": digest(content)}
        if name == "checkpoint.json":
            break
