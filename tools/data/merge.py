"""Join data sets into one: their documents in the order of the arguments, byte for byte what Megatron-LM's builder makes.

A .bin is copied inside the kernel, where the file system can by sharing its blocks; the .idx is computed anew.
"""
from __future__ import annotations

import argparse

from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader, file_paths
from megalm.data.rewrite import Part
from megalm.tools._command import counted
from megalm.tools._progress import Progress
from megalm.tools.data._common import described, inherited, open_all, parents_of, published, refuse_outputs, writing


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="PREFIX", help="the data sets, in their order")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="data/all writes data/all.bin and data/all.idx")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")


def check_alike(readers: list[IndexedReader]) -> None:
    """Raises DataError unless all have one dtype, and all or none are multimodal."""
    first = readers[0]
    for other in readers[1:]:
        if other.dtype != first.dtype:
            raise DataError(f"{first.prefix} holds {first.dtype.name} and {other.prefix} {other.dtype.name}: they come from "
                            "different vocabularies; tokenize one of them again")
        if (other.modes is None) != (first.modes is None):
            with_modes, without = (first, other) if other.modes is None else (other, first)
            raise DataError(f"{with_modes.prefix} is multimodal and {without.prefix} isn't")


def work(arguments: argparse.Namespace) -> int:
    """The command. Raises DataError for what is wrong with the data sets; then nothing is written."""
    files = [file_paths(prefix)[0].resolve() for prefix in arguments.inputs]  # m/a and m/./a are one
    for prefix, file in zip(arguments.inputs, files, strict=True):
        if files.count(file) > 1:
            raise DataError(f"{prefix} is named {files.count(file)} times: its documents would be doubled")
    readers = open_all(arguments.inputs)
    check_alike(readers)
    refuse_outputs([arguments.output], arguments.inputs, arguments.overwrite)
    parents = parents_of(readers)
    size = sum(reader.flat.nbytes for reader in readers)
    with Progress("merge", size, arguments.quiet) as progress, writing([arguments.output]) as (output,):
        parts = [Part(reader) for reader in readers]
        output.write(parts, progress.add)
        if parents is not None:
            output.describe(inherited(parents, output.counts(parts), made_by="merge"))
    if not arguments.quiet:
        print(f"{arguments.output}: {described(published(arguments.output))} from {counted(len(readers), 'data set')}; "
              f"{size / 1e6:,.1f} MB by {' and '.join(sorted(output.copied_by))} in {progress.seconds:.1f} s")
    return 0
