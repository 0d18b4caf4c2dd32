"""Text to tokens: JSON lines, plain text or parquet to PREFIX.bin and PREFIX.idx, Megatron-LM's indexed format.

    megalm preprocess --input corpus/ more.jsonl.zst --output data/wiki --tokenizer data/spm.model --workers 8

The output depends on the input and the options alone, not on the workers; it appears when it is complete. Whatever stops the
program, the same command goes on from what is done, which is kept in PREFIX.work.

    options     the command line                  inputs     files, and the pieces of them that are worked on at a time
    reading     bytes of documents                texts      JSON and UTF-8, and what is wrong with them
    backends    a reference and a fast tokenizer  checking   may the fast one be used
    encode      documents to arrays               job        the work on one piece
    streams     compressed files, cut to pieces   tasks      what is still to be done
    parts       the file that a worker makes      pool       worker processes
    store       PREFIX.work                       merge      parts to one data set
    program     all of it, in order               report     counts
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from megalm.tools._command import hearing_sigterm, run

from .options import parser

__all__ = ["main", "parser"]


def _preprocess(arguments: argparse.Namespace) -> int:
    from .program import preprocess  # only now: --help needs no numpy

    with hearing_sigterm():
        return preprocess(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr; 130 and 143, with one line too, for a Ctrl-C and a SIGTERM."""
    return run(parser(), _preprocess, argv)
