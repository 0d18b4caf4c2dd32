"""Plant real bugs in the kernels of csrc/, one at a time, and see that the cases catch each: proof that they can fail.

    python -m megalm.tools.mutate_kernels                  # all, half a minute each at most
    python -m megalm.tools.mutate_kernels --only norm --list

A bug is a replacement of text that stands in its file once. It is caught when the small cases of its operation fail under one of
three orders of threads, or crash, or hang, or when AddressSanitizer stops them.
"""
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megalm.tools._command import Parser, run
from megalm.tools.build_kernels import CSRC, ROOT, BuildError, build_shim, sanitizer
from megalm.tools.kernel_mutations import MUTATIONS, Mutation

OPERATIONS = {mutation.op for mutation in MUTATIONS}
ORDERS = ("0", "1", "7")
TIMEOUT = 300


@dataclass(frozen=True)
class Verdict:
    """How a planted bug was found; `by` is None where it wasn't."""

    mutation: Mutation
    by: str | None
    seconds: float


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of csrc/ with the bug. Raises ValueError where its text doesn't stand in the file exactly once."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    file = copy / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: its text stands {text.count(mutation.old)} times in {mutation.file}, not once")
    file.write_text(text.replace(mutation.old, mutation.new))
    return copy


def cases(library: Path, only: str, sanitized: bool) -> subprocess.CompletedProcess[str] | None:
    """The cases of an operation in a process of its own, up to the first failure; None where they hang."""
    command = [sys.executable, "-m", "megalm.tools.kernel_cases", str(library), "--only", only, "--stop"]
    command += ["--first-dtype"] if sanitized else ["--order", *ORDERS]
    try:
        return subprocess.run([*(sanitizer() if sanitized else []), *command], cwd=ROOT, capture_output=True, text=True,
                              timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None


def verdict(mutation: Mutation) -> Verdict:
    """Plant one bug and look for it: by the values first, then with AddressSanitizer."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megalm-mutation-") as folder:
        copy = mutated(mutation, Path(folder))
        by = None
        for sanitized in (False, True):
            try:
                library = build_shim(Path(folder) / f"library{sanitized}", sanitized, copy, only=mutation.op.split()[0])
            except BuildError as error:
                raise ValueError(f"{mutation.name}: {error}") from error
            done = cases(library, mutation.op, sanitized)
            if done is None or done.returncode:
                by = _reason(done, sanitized)
                break
    return Verdict(mutation, by, time.monotonic() - start)


def _reason(done: subprocess.CompletedProcess[str] | None, sanitized: bool) -> str:
    if done is None:
        return f"hangs: no end in {TIMEOUT} s"
    if sanitized:
        found = [line for line in done.stderr.splitlines() if "ERROR: AddressSanitizer" in line]
        return found[0].split("ERROR: ")[1].split(" on ")[0] if found else f"exit code {done.returncode} under AddressSanitizer"
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].removeprefix("FAILED ") if failed else f"crash, exit code {done.returncode}"


def mutate(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Returns 0 if every bug was caught, else 1."""
    chosen = [mutation for mutation in MUTATIONS if mutation.op.startswith(arguments.only)]
    if not chosen:
        raise ValueError(f"no mutation of an operation {arguments.only!r}; there are: {', '.join(sorted(OPERATIONS))}")
    if arguments.list:
        print("\n".join(f"{mutation.op:14} {mutation.name}" for mutation in chosen))
        return 0
    start = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        survived = 0
        for found in pool.map(verdict, chosen):
            survived += found.by is None
            print(f"{'caught  ' if found.by else 'SURVIVED'} {found.mutation.op}: {found.mutation.name}"
                  f"{' -- ' + found.by if found.by else ''} ({found.seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught in {time.monotonic() - start:.0f} s")
    return 1 if survived else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(prog="mutate_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bugs of operations whose name starts with this")
    parser.add_argument("--list", action="store_true", help="name the bugs and leave")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    return run(parser, mutate, argv)


if __name__ == "__main__":
    sys.exit(main())
