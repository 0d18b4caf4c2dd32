"""A corpus that every machine has: the Python standard library's own source files, as JSON lines.

    python -m megalm.tools.collect_corpus --output data/train.jsonl --valid data/valid.jsonl

Files are taken in the order of their paths; every 50th goes to the validation file.
"""
from __future__ import annotations

import argparse
import io
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megalm.data.errors import DataError
from megalm.data.publish import write_atomically
from megalm.tools._command import Parser, run

NOT_THE_LIBRARY = ("site-packages", "dist-packages", "__pycache__")


def source_files(folder: Path, exclude: Iterable[str]) -> list[Path]:
    """The .py files below a folder, relative to it, sorted; folders with an excluded name are left out."""
    exclude = set(exclude)
    found = (path.relative_to(folder) for path in folder.rglob("*.py") if path.is_file())
    return sorted((path for path in found if not exclude.intersection(path.parts)), key=lambda path: path.as_posix())


def read_source(path: Path) -> str | None:
    """The text of a Python file, in the encoding it declares; None if it is empty or has none (some test data is made so)."""
    try:
        raw = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
        text.encode("utf-8")
    except (SyntaxError, UnicodeError, LookupError):
        return None
    return text.replace("\r\n", "\n") or None


def json_lines(documents: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    for path, text in documents:
        yield json.dumps({"text": text, "path": path}, ensure_ascii=False).encode() + b"\n"


def collect(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Raises DataError if there are too few files."""
    folder = Path(arguments.folder or sysconfig.get_paths()["stdlib"])
    if arguments.every < 2:
        raise DataError(f"--every is {arguments.every}; it must be at least 2")
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    texts = ((path.as_posix(), read_source(folder / path)) for path in source_files(folder, arguments.exclude))
    documents = [(path, text) for path, text in texts if text is not None]
    if len(documents) < arguments.every:
        raise DataError(f"{folder} has {len(documents)} readable Python files; validation takes every {arguments.every}th")
    held_out = [document for place, document in enumerate(documents, start=1) if place % arguments.every == 0]
    kept = [document for place, document in enumerate(documents, start=1) if place % arguments.every]
    for name, part in ((arguments.output, kept), (arguments.valid, held_out)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(name), json_lines(part))
        print(f"{name}: {len(part):,} files, {sum(len(text) for _, text in part) / 1e6:.1f} million characters")
    return 0


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="collect_corpus", description=__doc__.splitlines()[0])
    result.add_argument("--output", required=True, metavar="FILE", help="the training file, .jsonl")
    result.add_argument("--valid", required=True, metavar="FILE", help="the validation file, .jsonl")
    result.add_argument("--every", type=int, default=50, metavar="N", help="every Nth file is held out for validation (50)")
    result.add_argument("--folder", help="where to look; by default the standard library of this Python")
    result.add_argument("--exclude", nargs="*", default=list(NOT_THE_LIBRARY), metavar="NAME", help="folders to leave out")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    return run(parser(), collect, argv)


if __name__ == "__main__":
    sys.exit(main())
