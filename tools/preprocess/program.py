"""megalm preprocess, step by step: inputs, tokenizer, the check, parts, one data set."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path

import megalm
from megalm.data.description import FORMAT, description_path, tokenizer_identity
from megalm.data.errors import DataError
from megalm.data.indexed import file_paths, refuse_existing, token_dtype
from megalm.data.tokenizer import Tokenizer, TokenizerSource, guess_source, load_tokenizer
from megalm.tools._command import counted
from megalm.tools._progress import Progress

from .checking import Sample, strange_samples
from .cleaning import Cleaning
from .inputs import Source, Unit, describe, file_hash, find_sources, make_units, usual_piece
from .job import Job
from .merge import Merger, prepare, publish, waiting
from .pool import Pool, with_samples
from .report import Totals, show_problems, summary
from .report_files import check_report, report_paths, write_report
from .store import Work
from .tasks import most_workers, remaining
from .texts import Policy

LAYOUT = 4  # of what lies in PREFIX.work: another version's isn't gone on with
SHORT = 500  # characters, that a text has in the mean


def preprocess(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Raises DataError for everything that is wrong with them or with the input."""
    source = replace(guess_source(arguments.tokenizer, arguments.tokenizer_type, arguments.eod),
                     special_tokens=arguments.special_tokens)
    tokenizer = load_tokenizer(source)
    if arguments.append_eod and tokenizer.eod is None:
        known = getattr(tokenizer, "eod_candidates", [])
        hint = f"; it has {' and '.join(known)}" if known else ""
        raise DataError(f"{arguments.tokenizer} doesn't say which token ends a document{hint}: name it with --eod, "
                        "or give --no-append-eod")
    outputs = (*file_paths(arguments.output), description_path(arguments.output))
    if arguments.report:
        check_report(Path(arguments.report), outputs)
        outputs += report_paths(Path(arguments.report))
    with Work(arguments.output) as work:
        if arguments.restart:
            work.restart()
        if not work.begun:
            refuse_existing(arguments.output, arguments.force)
        try:
            return _preprocess(arguments, work, source, tokenizer, outputs)
        except (OSError, KeyboardInterrupt) as error:
            kept = work.left()
            if isinstance(error, OSError):
                raise DataError(f"{error.filename or arguments.output}: {error.strerror}; {kept}") from error
            error.args = (kept,)
            raise


def _preprocess(arguments: argparse.Namespace, work: Work, source: TokenizerSource, tokenizer: Tokenizer,
                outputs: Sequence[Path]) -> int:
    sources = find_sources(arguments.input, work.store_stream, outputs)
    dtype, begun = token_dtype(tokenizer.vocab_size), work.run() or {}
    piece_bytes = arguments.piece_bytes or begun.get("piece_bytes") or usual_piece(sources)
    run = {"layout": LAYOUT, "tokenizer": tokenizer_identity(source) | {"eod": tokenizer.eod}, "dtype": str(dtype),
           "versions": versions(tokenizer), "verify": arguments.verify,
           "piece_bytes": piece_bytes, "options": options(arguments), "inputs": describe(sources)}
    goes_on = work.begin(run)
    units = make_units(sources, piece_bytes)
    policy = Policy(arguments.field, arguments.encoding_errors, arguments.skip_invalid)
    state = work.state() or {}
    made = waiting(work.folder, tuple(state.get("next", (0, 0))))
    progress = Progress("preprocess", sum(source.size for source in sources), arguments.quiet,
                        state.get("totals", {}).get("bytes_read", 0) + sum(made.values()))
    if goes_on and not arguments.quiet:
        print(f"going on: {progress.before / max(1, progress.total):.0%} was done", file=sys.stderr)
    if state.get("complete"):  # some of its files may have their final names already: only to be renamed
        totals, name = Totals.load(state["totals"]), "an earlier run"
    else:
        check = arguments.check_documents if tokenizer.type != "bytes" else 0
        job = Job(policy, dtype.str, str(work.folder), tuple(sources), piece_bytes, arguments.append_eod,
                  arguments.split_sentences, arguments.verify, cleaning_of(arguments), check > 0)
        workers = most_workers(units, job, state.get("next", (0, 0)), arguments.workers)
        worker, samples = with_samples(job, tokenizer, units, check, workers)
        strange = strange_samples(tokenizer) if samples else []
        with Pool(worker, [*samples, *strange], workers) as pool:
            fast, short, name = choose(arguments, pool, samples, len(strange))
            totals = make_all(units, pool, fast, short, Merger(work, dtype, job.cleaning, made), progress)
        if not totals.tokens:
            work.clear()
            raise nothing(totals, arguments)
        prepare(work, dtype, description(run, totals, sources, units))
    publish(work, arguments.output, description_path(arguments.output))
    if arguments.report:
        write_report(Path(arguments.report), totals)
    work.clear()
    show_problems(totals)
    if not arguments.quiet:
        print(summary(arguments.output, totals, dtype, progress, name))
    return 0


def versions(tokenizer: Tokenizer) -> dict[str, str | None]:
    """Of all that makes ids: a run that goes on with others might not go on to the same ones."""
    found = {"megalm": megalm.__version__}
    libraries = {"huggingface": ("tokenizers", "gigatoken"), "sentencepiece": ("sentencepiece", "gigatoken")}
    for name in libraries.get(tokenizer.type, ()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def options(arguments: argparse.Namespace) -> dict:
    """What the output depends on besides inputs and tokenizer."""
    names = ("field", "append_eod", "special_tokens", "split_sentences", "encoding_errors", "skip_invalid")
    return {name: getattr(arguments, name) for name in names} | {"cleaning": asdict(cleaning_of(arguments))}


def cleaning_of(arguments: argparse.Namespace) -> Cleaning:
    """The flags of cleaning. Raises DataError for limits that leave nothing."""
    wish = Cleaning(**{item.name: getattr(arguments, item.name) for item in fields(Cleaning)})
    for what in ("characters", "tokens"):
        least, most = getattr(wish, f"min_{what}"), getattr(wish, f"max_{what}")
        if most is not None and most < least:
            raise DataError(f"--min-{what} {least} is above --max-{what} {most}: nothing would stay")
    return wish


def choose(arguments: argparse.Namespace, pool: Pool, samples: Sequence[Sample], strange: int) -> tuple[bool, bool, str]:
    """(may the fast tokenizer be used, are texts short, the name of what is used); says why not, where there is one."""
    worker, tokenizer = pool.worker, pool.worker.reference.tokenizer
    if not worker.job.check:
        return False, False, tokenizer.type
    short = arguments.split_sentences or sum(len(sample.text) for sample in samples) < SHORT * len(samples)
    why = worker.why if worker.fast is None or samples else "no document could be read to compare the fast one on"
    if why:
        if not arguments.quiet:
            print(f"tokenizing at {tokenizer.type}'s own speed: {why}", file=sys.stderr)
        return False, False, tokenizer.type
    difference = pool.first_difference(short)
    if difference is None:
        return True, short, (f"{worker.fast.name} (equal to {tokenizer.type} on {counted(len(samples), 'document')} of these and "
                             f"{counted(strange, 'strange text')})")
    print(f"tokenizing at {tokenizer.type}'s own speed: {worker.fast.name} gives other ids for {difference}", file=sys.stderr)
    return False, False, tokenizer.type


def make_all(units: Sequence[Unit], pool: Pool, fast: bool, short: bool, merger: Merger, progress: Progress) -> Totals:
    """Make the parts that aren't there yet and take all in, in order."""
    tasks = remaining(units, pool.worker.job, merger.next, merger.made, pool.workers)
    try:
        with progress:
            for _ in pool.make(tasks, fast, short):
                for size in merger.add_all():
                    progress.add(size)
        assert merger.next == (len(units), 0), f"parts are missing from {merger.next} on, of {len(units)} units"
    finally:
        try:
            if merger.taken and not merger.broken:
                merger.note()
        finally:
            merger.close()
    return merger.totals


def nothing(totals: Totals, arguments: argparse.Namespace) -> DataError:
    """The error where there isn't a single token."""
    left_out = sum(documents for documents, _ in totals.reasons.values())
    names = ", ".join(arguments.input[:4])
    return DataError(f"no text in {names}: {counted(totals.documents, 'document')}, all empty, and {left_out:,} left out")


def description(run: dict, totals: Totals, sources: Sequence[Source], units: Sequence[Unit]) -> bytes:
    """PREFIX.data.json; it says nothing of when and how the work was done, so that it is the same each time."""
    pieces: dict[int, list[bytes]] = {}
    for number, digest in totals.hashes:
        pieces.setdefault(number, []).append(bytes.fromhex(digest))
    empty = [bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")]  # the SHA-256 of nothing
    found = {
        "format": FORMAT, "megalm": megalm.__version__, "tokenizer": run["tokenizer"], "dtype": run["dtype"],
        "documents": totals.documents, "sequences": totals.sequences, "tokens": totals.tokens, "bytes": totals.bytes,
        "options": run["options"], "left_out": totals.reasons,
        "sources": [{"name": source.name, "size": source.size,
                     "hash": file_hash(pieces.get(number, empty))}
                    for number, source in enumerate(sources)],
    }
    return json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n"

