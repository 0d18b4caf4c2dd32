"""The report of a run: JSON, one readable table, and the lengths of the documents as a picture."""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from pathlib import Path

from megalm.data.errors import DataError
from megalm.data.publish import write_atomically

from .report import Totals

BAR = 40  # characters of the longest bar


def figures(totals: Totals) -> dict:
    """What the report says; bytes are of UTF-8 text, and of the file's for what couldn't be read."""
    return {
        "in": {"documents": totals.documents_in, "bytes": totals.bytes_in},
        "out": {"documents": totals.documents, "sequences": totals.sequences, "tokens": totals.tokens, "bytes": totals.bytes,
                "empty_documents": totals.empty, "bytes_per_token": totals.bytes / max(1, totals.tokens),
                "tokens_per_document": totals.tokens / max(1, totals.documents)},
        "left_out": {why: {"documents": documents, "bytes": size} for why, (documents, size) in sorted(totals.reasons.items())},
        "changed": dict(sorted(totals.changed.items())), "not_utf8": totals.malformed,
        "tokens_histogram": {str(1 << power): count for power, count in enumerate(totals.histogram) if count},
    }


def table(found: dict) -> str:
    """The same for people."""
    width = max(map(len, ("documents of tokens", *(f"left out: {why}" for why in found["left_out"]), *found["changed"])))
    lines = [f"{'':<{width}}  {'documents':>15}  {'bytes':>19}"]

    def row(name: str, documents: int, size: int | None = None) -> None:
        lines.append(f"{name:<{width}}  {documents:>15,}" + (f"  {size:>19,}" if size is not None else ""))

    row("in", found["in"]["documents"], found["in"]["bytes"])
    for why, left in found["left_out"].items():
        row(f"left out: {why}", left["documents"], left["bytes"])
    for what, documents in found["changed"].items():
        row(what, documents)
    if found["not_utf8"]:
        row("not UTF-8", found["not_utf8"])
    out = found["out"]
    row("out", out["documents"], out["bytes"])
    row("of them empty", out["empty_documents"])
    lines += ["", f"{out['tokens']:,} tokens, {out['bytes_per_token']:.3f} bytes a token, "
              f"{out['tokens_per_document']:,.1f} tokens a document"]
    most = max(found["tokens_histogram"].values(), default=1)
    lines += ["", f"{'tokens from':>15}  {'documents':>15}"]
    for low, count in found["tokens_histogram"].items():
        lines.append(f"{int(low):>15,}  {count:>15,}  {'#' * round(BAR * count / most)}".rstrip())
    return "\n".join(lines) + "\n"


def report_paths(path: Path) -> tuple[Path, Path, Path]:
    """The files of a report: JSON, table, picture."""
    return path, path.with_suffix(".txt"), path.with_suffix(".png")


def check_report(path: Path, others: Collection[Path]) -> None:
    """Raises DataError for a name that doesn't end in .json, is a folder, can't be in one, or is the name of another output."""
    if path.suffix != ".json":
        raise DataError(f"--report {path}: give a name that ends in .json; beside it come .txt and .png")
    if path.is_dir() or path.resolve() in [other.resolve() for other in others]:
        what = "a folder" if path.is_dir() else "a file of the data set"
        raise DataError(f"--report {path}: that is {what}; give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--report {path}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"--report {path}: the folder {path.parent} can't be written to")


def write_report(path: Path, totals: Totals) -> None:
    """FILE.json, FILE.txt, and FILE.png where matplotlib is. Raises DataError where they can't be written."""
    found = figures(totals)
    path, text, image = report_paths(path)
    try:
        write_atomically(path, [json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n"])
        write_atomically(text, [table(found).encode()])
        picture(image, found["tokens_histogram"])
    except OSError as error:
        raise DataError(f"the data set is written, but not the report {path}: {error.strerror}; the same command writes it "
                        "too") from error
    except ImportError:
        print("no picture of the lengths: matplotlib isn't installed", file=sys.stderr)


def picture(path: Path, histogram: dict[str, int]) -> None:
    """Documents by their number of tokens, in powers of two."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="tight")).subplots()
    axes.bar(range(len(histogram)), list(histogram.values()), width=0.9)
    axes.set_xticks(range(len(histogram)), [f"{int(low):,}" for low in histogram], rotation=45, ha="right")
    axes.set_xlabel("tokens of a document, from")
    axes.set_ylabel("documents")
    figure.savefig(path, dpi=120)
