"""`megalm train` and what the launchers start: one rank where a launcher described one, else all ranks of this machine.

    megalm train CONFIG [section.key=value ...]
    deepspeed [--hostfile H] launch/run.py --config CONFIG [section.key=value ...]
    torchrun --nproc-per-node N launch/run.py --config CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megalm.config import ConfigError, load
from megalm.launch import local, output, rank
from megalm.launch.gpus import visible_gpus
from megalm.launch.process import deepspeed_of, leave_after
from megalm.parallel.process import die_with_parent
from megalm.parallel.stop import PREEMPTED


class _Parser(argparse.ArgumentParser):
    """argparse, with an error in one line, as all programs have it."""

    def error(self, message: str) -> NoReturn:
        output.mistake(ValueError(f"{message} (--help lists the options)"))
        raise SystemExit(rank.USER_ERROR)


def parse(argv: Sequence[str], program: str = "megalm train") -> argparse.Namespace:
    """The arguments: `.config`, `.overrides`, `.local_rank`, `.job`. Anything else is an error and exit code 2."""
    parser = _Parser(prog=program, description="Train the model that a config describes.", allow_abbrev=False)
    parser.add_argument("positional", nargs="*", metavar="CONFIG [section.key=value ...]", help="the config, then overrides")
    parser.add_argument("--config", help="the config file, where it isn't the first argument")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers; RANK and LOCAL_RANK are what counts")
    parser.add_argument("--job", default=rank.TRAIN, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    rest = list(arguments.positional)
    if arguments.config is None:
        if not rest:
            parser.error("no config file given")
        arguments.config = rest.pop(0)
    arguments.overrides = rest
    for item in rest:
        if "=" not in item:
            parser.error(f"{item!r} is neither an option nor a section.key=value")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run to the end and return the exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _one_rank(arguments)
    try:
        return local.start(arguments.config, arguments.overrides, arguments.job)
    except KeyboardInterrupt:  # before any rank was started
        return rank.INTERRUPTED


def _one_rank(arguments: argparse.Namespace) -> int:
    """This process is a rank of somebody's: torchrun's, deepspeed's, or the local launcher's."""
    number = int(os.environ["RANK"])
    ours = os.environ.get(local.LAUNCHER_PID)
    if ours is not None:
        die_with_parent(int(ours))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost terminal: the launcher passes it on as SIGTERM
    elif arguments.local_rank is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
        command = deepspeed_of(os.getppid())
        if command is not None:  # on one machine it passes no signal on to the launcher, which would train on without it
            with contextlib.suppress(OSError):
                leave_after(command)
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    if visible_gpus() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        config = load(arguments.config, arguments.overrides)
    except ConfigError as error:
        if number == 0:
            output.mistake(error)
        return rank.USER_ERROR
    console = os.dup(2)
    code = rank.run(arguments.job, arguments.config, arguments.overrides, config.train.dir, number)
    if code in (0, PREEMPTED):
        return code
    if ours is None and number != 0:  # rank 0's output is on the console, and our own launcher reports by itself
        log = output.log_path(config.train.dir, number)
        end = "".join(f"  | {line}\n" for line in output.tail(log))
        os.write(console, f"megalm: rank {number} failed: exit code {code}. The end of {log}:\n{end}".encode())
    os._exit(code)  # a rank that failed doesn't wait for threads or destructors that wait for other ranks


if __name__ == "__main__":
    sys.exit(main())
