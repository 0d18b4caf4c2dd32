"""Look into checkpoints: what one holds, whether it is sound, how two differ.

    megalm checkpoint inspect DIR [--json]     # a run's folder (its newest whole checkpoint) or one checkpoint
    megalm checkpoint verify DIR [--all]       # every byte against its hash; --all: every checkpoint of a run
    megalm checkpoint average DIR DIR ... --output DIR [--weights W W ...]
    megalm checkpoint diff DIR DIR             # counters, settings, layout, versions; each tensor that differs

Exit code: 0; 1 where something is damaged, or two differ; 2 for a mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megalm.checkpoint import CheckpointError, find, read_manifest
from megalm.checkpoint.find import candidates
from megalm.checkpoint.format import CHECKPOINTS, MANIFEST
from megalm.checkpoint.sealed import DamagedError
from megalm.checkpoint.verify import Tensor, size, tensors, verify
from megalm.tools import average
from megalm.tools._command import Parser, counted, fail, run

FOUND = 1
"""The exit code of a command that found what one doesn't want to find."""


def parser() -> Parser:
    main = Parser(prog="megalm checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True, parser_class=Parser)
    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("folder", metavar="DIR")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(work=_inspect)
    check = commands.add_parser("verify", help="compare every byte with its hash")
    check.add_argument("folder", metavar="DIR")
    check.add_argument("--all", action="store_true", help="every checkpoint of a run, not the newest only")
    check.set_defaults(work=_verify)
    diff = commands.add_parser("diff", help="how two checkpoints differ")
    diff.add_argument("folders", metavar="DIR", nargs=2)
    diff.set_defaults(work=_diff)
    mean = commands.add_parser("average", help="the average of their weights, as a checkpoint")
    average.add_arguments(mean)
    mean.set_defaults(work=average.average)
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    return run(parser(), _work, argv)


def _work(arguments: argparse.Namespace) -> int:
    try:
        return arguments.work(arguments)
    except DamagedError as error:
        fail(f"{error}; `megalm checkpoint verify` says of each checkpoint whether it is sound")
        return FOUND


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def _inspect(arguments: argparse.Namespace) -> int:
    folder = find(arguments.folder, _report)
    manifest, held = read_manifest(folder), tensors(folder)
    if arguments.json:
        about = {name: value for name, value in manifest.items() if name not in ("files", "xxh3")}
        print(json.dumps({"folder": str(folder), **about, "tensors": [dataclasses.asdict(tensor) for tensor in held]}))
        return 0
    layout = ", ".join(f"{name} {value}" for name, value in manifest["layout"].items())
    loss = "not measured" if manifest["eval_loss"] is None else f"{manifest['eval_loss']:.4f}"
    files, held_bytes = size(folder, manifest)
    rows = [("checkpoint", folder), ("step", f"{manifest['step']:,}"), ("samples drawn", f"{manifest['consumed_samples']:,}"),
            ("validation loss", loss), ("saved by", f"{counted(manifest['world_size'], 'rank')}: {layout}"),
            ("counters", json.dumps(manifest["counters"])),
            ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
            ("size", f"{held_bytes:,} bytes in {files} files")]
    for name, value in rows:
        print(f"{name:<16} {value}")
    print()
    _table(held)
    return 0


def _table(held: Sequence[Tensor]) -> None:
    """A line a part: shape, dtype, the roles it is stored in, bytes of all of them."""
    by_part: dict[str, list[Tensor]] = {}
    for tensor in held:
        by_part.setdefault(tensor.part, []).append(tensor)
    width = max([len(part) for part in by_part] or [4])
    print(f"{'part':<{width}}  {'shape':<18} {'dtype':<5} {'bytes':>15}  roles")
    for part, roles in by_part.items():
        shape = " x ".join(map(str, roles[0].shape))
        print(f"{part:<{width}}  {shape:<18} {roles[0].dtype:<5} {sum(role.bytes for role in roles):>15,}  "
              f"{', '.join(role.role for role in roles)}")


def _verify(arguments: argparse.Namespace) -> int:
    bad = 0
    for folder in _folders(arguments):
        found = verify(folder)
        bad += bool(found.problems)
        for problem in found.problems:
            print(f"{folder}: {problem}")
        if not found.problems:
            print(f"{folder}: sound: {found.bytes:,} bytes in {found.files} files")
    return FOUND if bad else 0


def _folders(arguments: argparse.Namespace) -> list[Path]:
    """What to look at, without asking whether it is whole: that is the question."""
    folder = Path(arguments.folder)
    if (folder / MANIFEST).exists():
        return [folder]
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a' if folder.exists() else 'no such'} folder")
    root = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    found = [path for _, path in candidates(root)]
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint here")
    return found if arguments.all else found[:1]


def _diff(arguments: argparse.Namespace) -> int:
    from megalm.checkpoint.diff import About, Tensors, differences

    folders = [find(folder, _report) for folder in arguments.folders]
    about = [About.read(folder) for folder in folders]
    for name, side in zip(arguments.folders, about, strict=True):
        if side.missing:
            print(f"{name}: {side.missing}")
    counts: dict[str, int] = {}
    for kind, found in differences(*about).items():
        counts[kind] = len(found)
        for difference in found:
            print(f"{difference.path}: {difference.stored!r} and {difference.current!r}")
    tensors = Tensors(*folders)
    only = [(name, held) for name, held in zip(arguments.folders, tensors.only(), strict=True) if held]
    for name, held in only:
        print(f"only in {name}: {', '.join(held)}")
    for found in tensors.differences():
        largest = "" if found.largest is None else f", largest difference {found.largest:.3g}"
        print(f"{found.role} of {found.part}: {found.what}{largest}")
        counts[found.kind] = counts.get(found.kind, 0) + 1
    differ = ", ".join(_counted(number, kind) for kind, number in counts.items() if number)
    print(f"different: {differ}" if differ else f"nothing {'else ' if only else ''}differs")
    return FOUND if differ or only else 0


def _counted(number: int, kind: str) -> str:
    """`2 facts of the layout`."""
    first, space, rest = kind.partition(" of ")
    return counted(number, first) + space + rest


if __name__ == "__main__":
    sys.exit(main())
