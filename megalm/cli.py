"""The `megalm` command: finds the program a command names and runs its `main(argv)`; imports nothing else before that."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

# command: (module with main(argv) -> exit code, what it does)
COMMANDS = {
    "train": ("megalm.launch.run", "train the model of a config; starts the ranks of this machine itself"),
    "plan": ("megalm.tools.plan", "what a config means on a cluster: ranks, layers, batch, memory, FLOPs; needs no GPU"),
    "kernels": ("megalm.tools.kernels", "what is compiled, and which backend each operation takes here and why"),
    "preprocess": ("megalm.tools.preprocess", "JSONL, plain text or parquet to .bin/.idx; goes on after a stop"),
    "data": ("megalm.tools.data.__main__", "merge, split, shuffle or inspect token files"),
    "train-tokenizer": ("megalm.tools.train_tokenizer", "train a SentencePiece or byte-level BPE tokenizer on text"),
    "convert": ("megalm.tools.convert", "checkpoints to Hugging Face folders and back"),
    "checkpoint": ("megalm.tools.checkpoint", "look into checkpoints: inspect, verify, diff; average them"),
    "generate": ("megalm.tools.generate", "continue a prompt with the model of a checkpoint"),
}


def usage() -> str:
    """The text of `megalm --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: megalm COMMAND ...", "", *lines, "", "megalm COMMAND --help says more."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 2 for one that doesn't exist."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `megalm plan ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        return 128 + 2


def _run(arguments: list[str]) -> int:
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    if arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"megalm {importlib.import_module('megalm').__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean `megalm {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
