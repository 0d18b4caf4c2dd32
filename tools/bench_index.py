"""How long the sample index of a large data set takes, for synthetic lengths, and how fast samples of a blend are fetched.

    python -m megalm.tools.bench_index --documents 10000000
"""
from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalm.data.blend import Source, build_dataset
from megalm.data.cache import cached
from megalm.data.errors import DataError
from megalm.data.indexed import IndexedWriter
from megalm.data.samples import build_index, samples_in
from megalm.tools._command import Parser, run

SETS = 50
FETCHED = 20_000_000  # tokens


def bench(arguments: argparse.Namespace) -> int:
    """The program, after its arguments: prints one JSON object."""
    if min(arguments.documents, arguments.mean_length, arguments.seq_length, arguments.epochs) < 1:
        raise DataError("every number must be at least 1")
    lengths = np.random.default_rng(0).geometric(1 / arguments.mean_length, arguments.documents).astype(np.int32)
    total = int(lengths.sum(dtype=np.int64))
    before, before_cpu = time.perf_counter(), time.process_time()
    arrays = build_index(len(lengths), lambda documents: lengths[documents], arguments.epochs, seed=1)
    built, built_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cached(Path(folder), "bench", {"of": "build"}, lambda: arrays)
        written = time.perf_counter()
        mapped = cached(Path(folder), "bench", {"of": "build"}, dict)
        read = time.perf_counter()
        fetch = fetched(Path(folder), arguments)
    print(json.dumps({
        "documents": arguments.documents, "tokens": total, "seq_length": arguments.seq_length, "epochs": arguments.epochs,
        "samples": samples_in(arguments.epochs, total, arguments.seq_length),
        "build_seconds": round(built - before, 2), "build_cpu_seconds": round(built_cpu - before_cpu, 2),
        "publish_seconds": round(written - built, 2), "hit_seconds": round(read - written, 2),
        "megabytes": round(sum(array.nbytes for array in mapped.values()) / 1e6),
        "peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, **fetch,
    }))
    return 0


def fetched(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Samples of a blend of data sets with unequal weights, read by one core from pages that are in memory already."""
    random = np.random.default_rng(1)
    for number in range(SETS):
        lengths = random.geometric(1 / arguments.mean_length, max(1, FETCHED // SETS // arguments.mean_length))
        with IndexedWriter(folder / f"set{number}", np.uint16) as writer:
            tokens = random.integers(0, 60_000, int(lengths.sum())).astype(np.uint16)
            writer.append(tokens, lengths, np.ones(len(lengths), np.int64))
    sources = [Source(str(folder / f"set{number}"), weight) for number, weight in enumerate(random.lognormal(0, 1, SETS))]
    count = max(1, FETCHED // arguments.seq_length)
    dataset = build_dataset(sources, arguments.seq_length, count, 1, None)
    out = np.empty(arguments.seq_length + 1, np.int64)
    seconds = []
    for _ in range(3):
        before = time.process_time()
        for index in range(count):
            dataset.tokens(index, out)
        seconds.append(time.process_time() - before)
    return {"fetch_million_tokens_a_core_second": round(count * arguments.seq_length / min(seconds) / 1e6, 1)}


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="bench_index", description=__doc__.splitlines()[0])
    result.add_argument("--documents", type=int, default=10_000_000)
    result.add_argument("--mean-length", type=int, default=1000, help="tokens a document, geometrically distributed")
    result.add_argument("--seq-length", type=int, default=2048)
    result.add_argument("--epochs", type=int, default=1)
    result.add_argument("--folder", help="where the index is published for the while; by default the folder for temporary files")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(parser(), bench, argv)


if __name__ == "__main__":
    sys.exit(main())
