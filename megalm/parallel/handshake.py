"""Before any work: do all ranks run the same thing? Different configs or versions otherwise end in a hang or in nonsense."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

import megalm
from megalm.parallel.world import LaunchError, World

LIBRARIES = ("torch", "deepspeed", "numpy", "pydantic", "safetensors")


def code_hash() -> str:
    """Hash of the package's own source files, by relative path and content."""
    root = Path(megalm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def facts(settings: Mapping[str, object]) -> dict[str, str]:
    """What must be equal on all ranks: each setting by dotted path, the versions, the code."""
    versions = {f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
    return {f"config {path}": repr(value) for path, value in settings.items()} | versions | {
        "version of python": platform.python_version(), "code of megalm": code_hash()}


def shake_hands(world: World, settings: Mapping[str, object]) -> None:
    """Raise LaunchError on every rank, naming each difference and who has which value, unless all ranks agree."""
    everyone = world.gather(facts(settings))
    problems = []
    for fact in sorted({name for one in everyone for name in one}):
        holders: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            holders.setdefault(one.get(fact, "absent"), []).append(rank)
        if len(holders) > 1:
            problems.append(f"{fact}: " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items()))
    if problems:
        raise LaunchError("the ranks were not started alike: " + "; ".join(problems))


def _ranks(ranks: list[int]) -> str:
    shown = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
