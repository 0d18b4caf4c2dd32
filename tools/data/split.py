"""Split a data set by documents, each of which lands in exactly one part: --fractions 0.98,0.01,0.01 or --documents rest,500,500.

By default a document's part is drawn (--seed), in exact numbers, and each part keeps the documents' order; --contiguous cuts the
data set into stretches instead. PREFIX_NAME is written for each name.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from megalm.data.errors import DataError
from megalm.data.permutation import Permutation
from megalm.data.rewrite import Part, everything
from megalm.tools._progress import Progress
from megalm.tools.data._common import described, inherited, open_all, parents_of, published, refuse_outputs, writing

USUAL = ("train", "valid", "test")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="PREFIX", help="the data set")
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--fractions", metavar="A,B,...", help="shares of the documents, of sum 1; one may be the word rest")
    sizes.add_argument("--documents", metavar="A,B,...", help="numbers of documents, of sum all; one may be the word rest")
    parser.add_argument("--names", metavar="A,B,...", help="of the parts (train,valid,test; of two train,valid; of more "
                        "than three part_0,part_1,...)")
    parser.add_argument("--output", metavar="PREFIX", help="PREFIX_NAME is written; by default the input's prefix")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--seed", type=int, default=1234, metavar="N", help="of the draw (1234)")
    order.add_argument("--contiguous", action="store_true", help="the first documents are the first part, and so on")
    parser.add_argument("--overwrite", action="store_true", help="replace existing data sets")


def numbers(option: str, text: str, whole: int) -> list[Fraction]:
    """The numbers of an option, with `rest` resolved. Raises DataError unless their sum is `whole`."""
    words = [word.strip() for word in text.split(",")]
    try:
        given = [None if word == "rest" else Fraction(word) for word in words]
    except (ValueError, ZeroDivisionError):
        raise DataError(f"{option} {text}: numbers apart by commas are wanted, and at most one word rest") from None
    total = sum(value for value in given if value is not None)
    if given.count(None) > 1 or any(value is not None and value < 0 for value in given):
        raise DataError(f"{option} {text}: every number must be at least 0, and at most one may be the word rest")
    if None in given and total <= whole:
        return [whole - total if value is None else value for value in given]
    if total != whole:
        words = [str(float(total)) if option == "--fractions" else f"{total} documents", f"must be {whole}"]
        raise DataError(f"{option} {text}: the sum is {words[0]} and {words[1]}, so that no document is lost or doubled")
    return given


def shares(fractions: list[Fraction], count: int) -> list[int]:
    """Whole numbers of sum `count` in these proportions: what rounding down leaves goes to the largest remainders."""
    result = [int(fraction * count) for fraction in fractions]
    by_remainder = sorted(range(len(fractions)), key=lambda k: (result[k] - fractions[k] * count, k))
    for k in by_remainder[:count - sum(result)]:
        result[k] += 1
    return result


def counts(arguments: argparse.Namespace, documents: int) -> list[int]:
    """Documents of each part."""
    if arguments.fractions is not None:
        return shares(numbers("--fractions", arguments.fractions, 1), documents)
    exact = numbers("--documents", arguments.documents, documents)
    if any(value.denominator != 1 for value in exact):
        raise DataError(f"--documents {arguments.documents}: a part of a document can't be had")
    return [int(value) for value in exact]


def drawn(documents: int, seed: int, low: int, high: int) -> Iterator[np.ndarray]:
    """The documents whose place in the shuffled order is within [low, high), ascending."""
    shuffle = Permutation(documents, seed)
    for piece in everything(documents):
        places = shuffle.place_of(piece)
        yield piece[(places >= low) & (places < high)]


def stretch(low: int, high: int) -> Iterator[np.ndarray]:
    for piece in everything(high - low):
        yield piece + low


def names_of(given: str | None, number: int) -> list[str]:
    """The names of so many parts. Raises DataError for those that don't fit."""
    if given is None:
        return list(USUAL[:number]) if number <= len(USUAL) else [f"part_{k}" for k in range(number)]
    names = given.split(",")
    if len(names) != number or len(set(names)) < number or not all(names):
        raise DataError(f"--names {given}: {number} different names are needed, one for each of the parts")
    return names


def work(arguments: argparse.Namespace) -> int:
    """The command. Raises DataError for what is wrong; then nothing is written."""
    reader, = open_all([arguments.input])
    sizes = counts(arguments, reader.num_documents)
    names = names_of(arguments.names, len(sizes))
    outputs = [f"{arguments.output or arguments.input}_{name}" for name in names]
    refuse_outputs(outputs, [arguments.input], arguments.overwrite)
    parents = parents_of([reader])
    with Progress("split", reader.flat.nbytes, arguments.quiet) as progress, writing(outputs) as written:
        low = 0
        for output, size in zip(written, sizes, strict=True):
            bounds = (low, low + size)
            order = (lambda b=bounds: stretch(*b)) if arguments.contiguous else (
                lambda b=bounds: drawn(reader.num_documents, arguments.seed, *b))
            parts = [Part(reader, order)]
            output.write(parts, progress.add)
            if parents is not None:
                how = {"contiguous": True} if arguments.contiguous else {"seed": arguments.seed}
                output.describe(inherited(parents, output.counts(parts), made_by="split", place=bounds, **how))
            low += size
    if not arguments.quiet:
        for output in outputs:
            print(f"{output}: {described(published(output))}")
    return 0
