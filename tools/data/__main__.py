"""Merge, split, shuffle or inspect token files (.bin/.idx), also those that Megatron-LM or GPT-NeoX made.

    megalm data merge data/a data/b --output data/all
    megalm data split data/all --fractions 0.98,0.01,0.01 --names train,valid,test
    megalm data shuffle data/all --output data/shuffled --seed 1
    megalm data inspect data/all --document 7 --tokenizer data/spm.model

What is written appears when all of it is complete. A data set is named by its prefix: data/all is data/all.bin and data/all.idx.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megalm.tools._command import Parser, run
from megalm.tools.data import inspect, merge, shuffle, split

COMMANDS = {"merge": merge, "split": split, "shuffle": shuffle, "inspect": inspect}


def parser() -> Parser:
    """The command line; each command adds its own options."""
    result = Parser(prog="megalm data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=module.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_options(sub)
        sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
        sub.set_defaults(work=module.work)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    return run(parser(), lambda arguments: arguments.work(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
