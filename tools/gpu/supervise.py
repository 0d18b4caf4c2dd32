"""Runs the stages of tools/gpu_check.py one after the other, each in its own processes, within one limit on time.

A worker writes a line of JSON when it begins an item and when it ends one. Where it dies or exceeds its time, that item has
failed and another worker goes on with the next. Nothing here imports torch: what a GPU does to a process ends with that process.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.tools._command import Parser, run
from megalm.tools.gpu.report import failures, markdown

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 150  # until a worker's first line: imports, and a GPU's first use
POLL_SECONDS = 0.05
TAIL_LINES = 15


@dataclass(frozen=True)
class Stage:
    """`share`: how much of the time that is left it may take, unless it is the last. `fresh`: each item gets a new process."""

    name: str
    share: float
    item_seconds: float
    fresh: bool = False


STAGES = (Stage("build", 0.7, 600), Stage("cases", 0.35, 60), Stage("bench", 0.45, 150), Stage("train", 0.75, 240, fresh=True),
          Stage("sanitize", 1.0, 150))
MACHINE = Stage("machine", 1.0, 60)


class Record:
    """The document of a run, on disk after every change."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self.document: dict[str, Any] = {**about, "stages": {}}

    def begin(self, stage: str, seconds: float) -> dict[str, Any]:
        """A stage's own part, which the caller fills."""
        part = self.document["stages"][stage] = {"status": "running", "limit": round(seconds), "items": 0, "results": []}
        return part

    def save(self, table: bool = False) -> None:
        """Write the document, and the table beside it where asked."""
        _replace(self.path, json.dumps(self.document, indent=1) + "\n")
        if table:
            _replace(self.path.with_suffix(".md"), self.table())

    def table(self) -> str:
        """For people. A result that the table can't show must not cost those that follow."""
        try:
            return markdown(self.document)
        except Exception as error:
            return f"no table, {type(error).__name__}: {error}; see {self.path}\n"


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class Worker:
    """One process of a stage, from item `first` on."""

    def __init__(self, stage: Stage, settings: dict[str, Any], first: int, log: Path):
        self.stage, self.log = stage, log
        self.begun: int | None = None
        self.last = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="megalm-gpu-")
        self._lines = Path(self._folder.name) / "lines"
        self._lines.touch()
        self._read = 0
        order = {**settings, "stage": stage.name, "first": first, "count": 1 if stage.fresh else None, "out": str(self._lines)}
        with log.open("a") as output:
            output.write(f"---- {stage.name} from {first}\n")
            output.flush()
            self._process = subprocess.Popen([*command(), "--worker", json.dumps(order)], stdin=subprocess.DEVNULL, stdout=output,
                                             stderr=output, cwd=ROOT, start_new_session=True, preexec_fn=_die_with_parent)

    def events(self) -> list[dict[str, Any]]:
        """The whole lines that are new."""
        text = self._lines.read_text()
        new, self._read = text[self._read:text.rfind("\n") + 1], text.rfind("\n") + 1
        return [json.loads(line) for line in new.splitlines()]

    def ended(self) -> str | None:
        """How the process ended, None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"

    def overdue(self) -> str | None:
        """What took too long, None if nothing has."""
        limit = START_SECONDS if self.begun is None else self.stage.item_seconds
        return f"took more than {limit:.0f} s" if time.monotonic() - self.last > limit else None

    def tail(self) -> str:
        """The end of what the process printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def close(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def command() -> list[str]:
    """How a worker is started: by path in a checkout, which may not be installed; as a module elsewhere."""
    file = ROOT / "tools/gpu_check.py"
    return [sys.executable, str(file)] if file.exists() else [sys.executable, "-m", "megalm.tools.gpu_check"]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def supervise(stage: Stage, settings: dict[str, Any], seconds: float, part: dict[str, Any], log: Path,
              changed: Callable[[], None]) -> None:
    """Fill `part`: {items, results, status}. Every item has its result, or the reason why it has none, or was not reached."""
    begin, first, total = time.monotonic(), 0, None
    while total is None or first < total:
        worker = Worker(stage, settings, first, log)
        try:
            first, total, why = _follow(worker, first, total, begin + seconds, part, changed)
        finally:
            worker.close()
        if why is not None:
            part["status"] = why
            break
    else:
        part["status"] = "done"
    part["seconds"] = round(time.monotonic() - begin, 1)
    changed()


def _follow(worker: Worker, first: int, total: int | None, deadline: float, part: dict[str, Any],
            changed: Callable[[], None]) -> tuple[int, int | None, str | None]:
    """(the next item, how many there are, None or why the stage ends) once this worker is done."""
    name, start = "", first
    while True:
        how = worker.ended()  # before the last lines are read
        for event in worker.events():
            worker.last = time.monotonic()
            if "items" in event:
                total = part["items"] = event["items"]
            elif "begin" in event:
                worker.begun, name = event["begin"], event["name"]
            else:
                part["results"].append({"name": name, **event["result"], "took": event["took"]})
                first, worker.begun = event["end"] + 1, None
                changed()
        late = worker.overdue()
        if how is None and late is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            continue
        if how is None and late is None:
            return first, total, f"stopped at its limit on time, {first} of {'?' if total is None else total} done"
        if worker.begun is not None:
            part["results"].append({"name": name, "failed": f"the process {late or f'ended: {how}'}", "output": worker.tail()})
            changed()
            return worker.begun + 1, total, None
        if first > start:  # it has done what it was to do, or left a GPU in error after its last item
            return first, total, None
        part["output"] = worker.tail()
        return first, total, f"failed: the process {late or f'ended: {how}'}"


def check(arguments: argparse.Namespace) -> int:
    """The program, after its arguments."""
    settings = {"dry_run": arguments.dry_run, "shim": str(arguments.shim.resolve()) if arguments.shim else None,
                "seed": arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(4), "little")}
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="megalm-gpu-") as folder:
        machine: dict[str, Any] = {"results": []}
        supervise(MACHINE, settings, MACHINE.item_seconds, machine, Path(folder) / "log", lambda: None)
        about = machine["results"][0] if machine["results"] else {"failed": machine["status"] + "\n" + machine.get("output", "")}
    if "failed" in about:
        raise ValueError(about["failed"])
    about = {key: value for key, value in about.items() if key not in ("name", "took")}
    path = arguments.out or default_path(about["device"], arguments.dry_run)
    log = path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    record = Record(path, {**about, "date": time.strftime("%Y-%m-%d"), "minutes": arguments.minutes, **settings})
    chosen = [stage for stage in STAGES if stage.name in arguments.stages]
    for stage in chosen:
        left = max(0.0, end - time.monotonic())
        seconds = left if stage is chosen[-1] else left * stage.share
        part = record.begin(stage.name, seconds)
        record.save()
        supervise(stage, settings, seconds, part, log, record.save)
        record.save(table=True)
        print(f"{stage.name}: {part['status']}, {len(part['results'])} results in {part['seconds']:.0f} s", flush=True)
    print(record.table())
    print(f"{path} and {path.with_suffix('.md').name}")
    return 1 if failures(record.document) else 0


def default_path(device: str, dry_run: bool) -> Path:
    """benchmarks/gpu/<device>-<date>.json, in build/ for a dry run."""
    root = ROOT if (ROOT / "csrc").exists() else Path.cwd()  # a checkout, else wherever the user stands
    if dry_run:
        return root / "build/gpu/dry-run.json"
    return root / "benchmarks/gpu" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{time.strftime('%Y-%m-%d')}.json"


def main(argv: Sequence[str], description: str) -> int:
    """Returns the exit code."""
    head, _, rest = description.partition("\n\n")
    parser = Parser(prog="gpu_check", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; each stage may take a share of what is left")
    parser.add_argument("--out", type=Path, help="the JSON file; the table and a log go beside it")
    parser.add_argument("--seed", type=int, help="of the inputs of the cases; default: a new one each run")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, through the shim, with tiny shapes")
    parser.add_argument("--shim", type=Path, metavar="LIB", help="with --dry-run: this library instead of a new one")
    return run(parser, check, argv)
