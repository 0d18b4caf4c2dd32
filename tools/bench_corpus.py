"""JSON lines to .bin and .idx, end to end: megalm preprocess against Megatron-Core's way, tokenizers and sentencepiece.

    python -m megalm.tools.bench_corpus --tokenizer qwen.tiktoken llama.model --megabytes 100 --out benchmarks/corpus.json
    python -m megalm.tools.bench_corpus --tokenizer bytes --document-bytes 1000000000      # one document of 1 GB: time and memory

All of a tokenizer's rivals run one after the other on one core, on the same text (Python's library, or --corpus), and must write
the same bytes. A rate is MB of JSON lines over processor seconds of the whole process, start and check included; wall seconds
stand beside. Two workers on two cores are compared with one on one by wall seconds (bench_corpus_scaling.py says how), on as much
text as is asked for. Where there is less, it comes again, and then the fast tokenizer knows its words: `distinct_megabytes` of
the report says how much there is, and --scaling-megabytes with that number measures on nothing else.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megalm.data.publish import write_atomically
from megalm.tools._command import Parser, positive, run
from megalm.tools.bench_corpus_peers import from_tiktoken, same
from megalm.tools.bench_corpus_scaling import rounds, several, started

SUFFIXES = (".py", ".rst", ".txt", ".md", ".pyi", ".h")


def collect(path: Path, megabytes: int) -> None:
    """Sources and documentation of this Python and its packages, in random order, as JSON lines."""
    paths = sorted(found for found in Path(sysconfig.get_paths()["stdlib"]).rglob("*") if found.suffix in SUFFIXES)
    paths += sorted(found for root in sys.path if root.endswith("site-packages") for found in Path(root).rglob("*")
                    if found.suffix in SUFFIXES)
    random.Random(0).shuffle(paths)
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for found in paths:
            try:
                text = found.read_bytes().decode()
            except (UnicodeDecodeError, OSError):
                continue
            size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if size >= megabytes * 1_000_000:
                return


def timed(command: Sequence[str], cores: int) -> dict[str, float]:
    """Wall and processor seconds, and the peak memory, of a process with its children, on so many cores."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = started(command, sorted(os.sched_getaffinity(0))[:cores])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise ValueError(f"{' '.join(command[:4])} ... ended with exit code {process.returncode}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(wall, 2), "cpu_seconds": round(seconds, 2), "peak_megabytes": used.ru_maxrss // 1024}


def ours(inputs: Sequence[Path], output: Path, model: str, eod: str, workers: int, *more: str) -> list[str]:
    """The peers take a special token's text for that token, so here megalm does too."""
    ends = ["--eod", eod, "--special-tokens"] if model.endswith(".json") else []
    kind = [] if model.endswith(".json") or model == "bytes" else ["--tokenizer-type", "sentencepiece"]
    return [sys.executable, "-m", "megalm.tools.preprocess", "--input", *map(str, inputs), "--output", str(output),
            "--tokenizer", model, "--workers", str(workers), "--force", *ends, *kind, *more]


def compare(corpus: Path, folder: Path, model: str, eod: str, arguments: argparse.Namespace) -> dict:
    """All rivals on one tokenizer; raises ValueError if they don't write the same."""
    library = "tokenizers" if model.endswith(".json") else "sentencepiece"
    found = {"megalm": timed(ours([corpus], folder / "megalm", model, eod, 1), 1)}
    for peer in (library, "megatron-core")[:1 + arguments.megatron]:
        command = [sys.executable, "-W", "ignore", "-m", "megalm.tools.bench_corpus_peers", peer, str(corpus), str(folder / peer)]
        found[peer] = timed([*command, model, eod], 1)
        if not same(str(folder / "megalm"), str(folder / peer)):
            raise ValueError(f"{peer} and megalm write different data sets from {corpus} with {model}")
    found["megalm, unchecked"] = timed(ours([corpus], folder / "megalm", model, eod, 1, "--check-documents", "1"), 1)
    size = corpus.stat().st_size / 1e6
    for entry in found.values():
        entry["megabytes_a_second"] = round(size / entry["cpu_seconds"], 2)
        entry["times"] = round(found[library]["cpu_seconds"] / entry["cpu_seconds"], 2)
    return {"library": library, "rivals": found}


def scaling(corpus: Path, folder: Path, model: str, eod: str, arguments: argparse.Namespace) -> dict:
    """One worker and two, on one core and two."""
    inputs = several(corpus, folder / "several", arguments.scaling_megabytes)
    distinct = corpus.stat().st_size / 1e6
    found = rounds(lambda output, workers: ours(inputs, output, model, eod, workers), folder, arguments.pairs)
    return {"megabytes": round(distinct * len(inputs)), "distinct_megabytes": round(distinct), **found}


def one_document(folder: Path, model: str, eod: str, size: int) -> dict:
    """One document of so many bytes."""
    path = folder / "one.jsonl"
    sentence = "The lighthouse keeper counted the ships twice each evening, 灯塔守望者. "
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"text": "')
        block = sentence * 10_000
        for _ in range(size // len(block.encode())):
            file.write(block)
        file.write('"}\n')
    return {"bytes": path.stat().st_size, **timed(ours([path], folder / "one", model, eod, 1), 1)}


def table(report: dict) -> str:
    """The comparison for people."""
    lines = []
    for name, result in report["tokenizers"].items():
        lines.append(name)
        if "rivals" in result:
            lines.append(f"  {'':<34}{'MB/s':>8}{'times ' + result['library']:>24}{'MB of memory':>14}")
            lines += [f"  {rival:<34}{entry['megabytes_a_second']:>8}{entry['times']:>24}{entry['peak_megabytes']:>14}"
                      for rival, entry in result["rivals"].items()]
        if (two := result.get("two_workers")) is not None:
            lines.append(f"  two workers on two cores: {two['times']} times one on one (least of each: {two['times_of_least']}); "
                         f"two runs at once, one on each core: {two['ceiling']} ({two['ceiling_of_least']}); "
                         f"{two['megabytes']} MB, {two['distinct_megabytes']} of them distinct")
    lines += [f"one document, {name}: {entry}" for name, entry in report["one_document"].items()]
    return "\n".join(lines)


def bench(arguments: argparse.Namespace) -> int:
    """The program, after its arguments."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        report: dict = {"tokenizers": {}, "one_document": {}}
        corpus = Path(arguments.corpus) if arguments.corpus else folder / "corpus.jsonl"
        large = corpus
        if not arguments.corpus and not arguments.document_bytes:
            collect(corpus, arguments.megabytes)
            large = folder / "large.jsonl"
            if arguments.pairs:
                collect(large, arguments.scaling_megabytes)
        for given in arguments.tokenizer:
            model = str(from_tiktoken(Path(given), folder)) if given.endswith(".tiktoken") else given
            if arguments.document_bytes:
                report["one_document"][Path(given).name] = one_document(folder, model, arguments.eod, arguments.document_bytes)
            else:
                report["corpus_bytes"] = corpus.stat().st_size
                entry = compare(corpus, folder, model, arguments.eod, arguments) if arguments.rivals else {}
                if arguments.pairs:
                    entry["two_workers"] = scaling(large, folder, model, arguments.eod, arguments)
                report["tokenizers"][Path(given).name] = entry
    print(table(report))
    if arguments.out:
        write_atomically(Path(arguments.out), [json.dumps(report, indent=1).encode() + b"\n"])
    return 0


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="bench_corpus", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--tokenizer", nargs="+", required=True, metavar="PATH", help="tokenizer.json, sentencepiece, Qwen's .tiktoken; bytes")
    add("--eod", default="<|endoftext|>", metavar="TOKEN", help="of a tokenizer.json (<|endoftext|>)")
    add("--corpus", metavar="FILE.jsonl", help="by default the text of this Python's files")
    add("--megabytes", type=positive, default=100, help="of that text (100)")
    add("--pairs", type=int, default=3, help="rounds of one core, two cores, and two runs at once; 0: none (3)")
    add("--scaling-megabytes", type=positive, default=4000,
        help="of that text for those; where there is less, several times (4000)")
    add("--no-rivals", dest="rivals", action="store_false", help="those rounds alone")
    add("--no-megatron", dest="megatron", action="store_false", help="without Megatron-Core, which takes seconds to start")
    add("--document-bytes", type=positive, help="instead: one document of so many bytes")
    add("--folder", help="where to work; by default the folder for temporary files")
    add("--out", metavar="FILE.json")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(parser(), bench, argv)


if __name__ == "__main__":
    sys.exit(main())
