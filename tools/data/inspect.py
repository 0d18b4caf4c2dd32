"""What a data set holds: counts, lengths, ids; one document as text (--document N); every byte of it checked (--verify).

Without --quick all tokens are read, for the range of the ids and the share of the end-of-document token.
"""
from __future__ import annotations

import argparse
import json

from megalm.data.description import named, read_description, tokenizer_problems
from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader
from megalm.data.statistics import (
    Summary,
    check_whole,
    document_holding,
    document_tokens,
    first_outside,
    scan,
    summarize,
)
from megalm.data.tokenizer import TYPES, Tokenizer, TokenizerSource, guess_source, load_tokenizer
from megalm.tools._command import Parser, counted
from megalm.tools._progress import Progress
from megalm.tools.data._common import open_all

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
BAR = 40  # characters of the longest bar


def add_options(parser: Parser) -> None:
    parser.add_argument("input", metavar="PREFIX", help="the data set")
    parser.add_argument("--document", type=int, metavar="N", help="print this document instead, from 0")
    parser.add_argument("--tokens", action="store_true", help="of that document the ids")
    parser.add_argument("--tokenizer", metavar="PATH|bytes", help="decodes the document, and says which ids can be")
    parser.add_argument("--tokenizer-type", choices=TYPES, help="where the path doesn't say it")
    parser.add_argument("--eod", metavar="TOKEN", help="the token that ends a document, for a tokenizer.json")
    parser.add_argument("--verify", action="store_true", help="check the .idx against the .bin, and all ids with a --tokenizer")
    parser.add_argument("--quick", action="store_true", help="look at the .idx and the ends of documents only")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def tokenizer_of(arguments: argparse.Namespace) -> Tokenizer | None:
    if arguments.tokenizer is None:
        return None
    return load_tokenizer(source_of(arguments))


def source_of(arguments: argparse.Namespace) -> TokenizerSource:
    return guess_source(arguments.tokenizer, arguments.tokenizer_type, arguments.eod)


def work(arguments: argparse.Namespace) -> int:
    """The command. Raises DataError for a data set that is damaged or, with --verify, isn't in order."""
    reader, = open_all([arguments.input])
    tokenizer = tokenizer_of(arguments)
    if arguments.document is not None:
        return show_document(reader, tokenizer, arguments)
    if arguments.verify:
        verify(reader, tokenizer)
        problems = [] if tokenizer is None else tokenizer_problems([reader.prefix], source_of(arguments))
        if problems:
            raise DataError("; ".join(problems))
    report = statistics(reader, tokenizer, arguments)
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def show_document(reader: IndexedReader, tokenizer: Tokenizer | None, arguments: argparse.Namespace) -> int:
    """The text of a document, or its ids where nobody can decode them."""
    ids = document_tokens(reader, arguments.document).tolist()
    report = {"document": arguments.document, "length": len(ids)}
    if tokenizer is None or arguments.tokens:
        report["tokens"] = ids
    if tokenizer is not None:
        outside = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
        if outside:
            raise foreign(reader, arguments.document, outside[0], tokenizer)
        report["text"] = tokenizer.decode(ids)
    if arguments.json:
        print(json.dumps(report))
    elif "tokens" in report:
        print(" ".join(map(str, ids)))
    else:
        print(report["text"])
    return 0


def verify(reader: IndexedReader, tokenizer: Tokenizer | None) -> None:
    """Raises DataError unless every byte belongs to one sequence, and every id to the tokenizer."""
    check_whole(reader)
    place = None if tokenizer is None else first_outside(reader, tokenizer.vocab_size)
    if place is not None:
        raise foreign(reader, document_holding(reader, place), int(reader.flat[place]), tokenizer)


def foreign(reader: IndexedReader, document: int, token: int, tokenizer: Tokenizer) -> DataError:
    """The error for an id that the tokenizer doesn't have."""
    return DataError(f"document {document} of {reader.prefix} holds the id {token}, and the tokenizer has "
                     f"{tokenizer.vocab_size:,}: the data set was made with another tokenizer")


def statistics(reader: IndexedReader, tokenizer: Tokenizer | None, arguments: argparse.Namespace) -> dict:
    """Everything that is printed, by name."""
    summary = summarize(reader)
    eod = end_of_document(summary, tokenizer)
    documents = reader.num_documents
    report = {
        "prefix": reader.prefix, "documents": documents, "sequences": len(reader), "tokens": reader.total_tokens,
        "dtype": reader.dtype.name, "bin_bytes": reader.flat.nbytes, "idx_bytes": reader.idx_path.stat().st_size,
        "multimodal": reader.modes is not None, "mean_length": round(reader.total_tokens / documents, 1) if documents else 0,
        "percentiles": dict(zip(map(str, PERCENTILES), summary.lengths.percentiles(PERCENTILES), strict=True)),
        "histogram": [{"from": low, "below": high, "documents": count} for low, high, count in summary.lengths.histogram()],
        "eod": eod, "documents_ending_with_eod": summary.ends.get(eod, 0),
        "last_tokens": {str(token): count for token, count in summary.ends.items()},
    }
    description = read_description(reader.prefix)
    if description is not None:
        report["description"] = description
    if not arguments.quick:
        with Progress("inspect", reader.flat.nbytes, arguments.quiet) as progress:
            found = scan(reader, eod, progress.add)
        report |= {"lowest_id": found.lowest, "highest_id": found.highest, "eod_tokens": found.of_eod}
    if arguments.verify:
        report["verified"] = True
    return report


def end_of_document(summary: Summary, tokenizer: Tokenizer | None) -> int | None:
    """The tokenizer's, else what most documents end with, if it is most of them."""
    if tokenizer is not None and tokenizer.eod is not None:
        return tokenizer.eod
    most = next(iter(summary.ends.items()), (None, 0))
    return most[0] if most[1] * 2 > summary.lengths.count else None


def table(report: dict) -> str:
    """The report for people."""
    lines = [
        f"{report['prefix']}: {counted(report['documents'], 'document')}, {counted(report['sequences'], 'sequence')}, "
        f"{counted(report['tokens'], 'token')} ({report['dtype']}){', multimodal' if report['multimodal'] else ''}",
        f"files         .bin {report['bin_bytes']:,} bytes, .idx {report['idx_bytes']:,} bytes",
    ]
    if "description" in report:
        lines.append(f"tokenizer     {named(report['description']['tokenizer'])}")
    if report["documents"]:
        shown = [f"{'shortest' if p == '0' else 'longest' if p == '100' else p + '%'} {length:,}"
                 for p, length in report["percentiles"].items()]
        lines.append(f"lengths       mean {report['mean_length']:,}; " + ", ".join(shown))
    if report["eod"] is None:
        lines.append("ends          no one token ends most documents")
    else:
        ended = report["documents_ending_with_eod"] / max(1, report["documents"])
        share = report.get("eod_tokens", 0) / max(1, report["tokens"])
        of_all = f", which is {share:.3%} of all tokens" if "eod_tokens" in report else ""
        lines.append(f"ends          {ended:.2%} of the documents end with the id {report['eod']}{of_all}")
    if report.get("highest_id", -1) >= 0 or report.get("lowest_id", 0) < 0:
        lines.append(f"ids           {report['lowest_id']:,} to {report['highest_id']:,}")
    if report.get("verified"):
        lines.append("verified      the .idx describes every byte of the .bin once, in order")
    most = max((bar["documents"] for bar in report["histogram"]), default=1) or 1
    if report["histogram"]:
        lines.append("documents by length in tokens")
    for bar in report["histogram"]:
        label = "0" if bar["below"] == 1 else f"{bar['from']:,} to {bar['below'] - 1:,}"
        lines.append(f"{label:>26}  {bar['documents']:>13,}  {'#' * -(-BAR * bar['documents'] // most)}")
    return "\n".join(lines)
