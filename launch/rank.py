"""One rank, whoever started it: its log file, and megalm.train.run inside it."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from megalm.config import ConfigError
from megalm.data.errors import DataError
from megalm.launch import output
from megalm.launch.process import ignored
from megalm.plan import PlanError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
USER_ERROR = 2

# What a rank runs, as "module:function" of (config path, overrides) -> exit code.
TRAIN = "megalm.train:run"


def resolve(job: str) -> Callable[[str, Sequence[str]], int]:
    """The function that "module:function" names."""
    module, _, function = job.partition(":")
    return getattr(importlib.import_module(module), function)


def run(job: str, config_path: str, overrides: Sequence[str], run_folder: str | Path, rank: int) -> int:
    """Redirect this process's output, run the job and return the exit code; no exception passes.

    A user's mistake is one line and exit code 2, an interruption before the job took the signals over 130, anything
    else a traceback and 1.
    """
    if not ignored(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    try:
        output.prepare(run_folder)
        output.redirect(output.log_path(run_folder, rank), console=rank == 0)
        return int(resolve(job)(config_path, list(overrides)))
    except (ConfigError, PlanError, DataError) as error:
        output.mistake(error)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
