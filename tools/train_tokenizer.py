"""Train a tokenizer on a sample of a corpus: sentencepiece (bpe, unigram) or byte-level BPE. The same texts give the same bytes.

    megalm train-tokenizer --input a.jsonl --vocab-size 32000 --output data/spm.model
    megalm train-tokenizer --input shards/*.jsonl --vocab-size 64000 --type byte-bpe --output data/tokenizer.json \\
                           --held-out en=english.jsonl zh=chinese.jsonl

Nothing is normalised: a text comes back from its ids as it was (but for U+2581, which sentencepiece uses for the space). Spaces
are kept, digits are split, and what no piece covers, line ends included, is spelled in bytes. Neither the sample nor the model
depends on the order of the files. Beside the model, NAME.report.json says what it was trained on and how many bytes of held-out
text a token has.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megalm import __version__
from megalm.data.errors import DataError
from megalm.data.publish import write_atomically
from megalm.data.tokenizer import TokenizerSource, load_tokenizer
from megalm.tools._command import Parser, counted, positive, run
from megalm.tools._corpus import Corpus
from megalm.tools._held_out import Group, measure, table, together
from megalm.tools._progress import shown, ticking
from megalm.tools._trainers import DIGITS, SUFFIX, Recipe, train
from megalm.tools.preprocess.options import ENCODING_ERRORS

LIBRARY = {"bpe": "sentencepiece", "unigram": "sentencepiece", "byte-bpe": "tokenizers"}


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """What the options ask for. Raises DataError where that can't be."""
    recipe = Recipe(arguments.type, arguments.vocab_size, arguments.eod, tuple(arguments.special_tokens), arguments.digits,
                    arguments.byte_fallback, arguments.character_coverage)
    recipe.check()
    return recipe


def output_of(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """(model, report). Raises DataError if the name doesn't fit the type, or a file may not be replaced."""
    suffix = SUFFIX[arguments.type]
    output = Path(arguments.output or f"{arguments.model_prefix}{suffix}")
    if output.suffix != suffix:
        others = [kind for kind in SUFFIX if SUFFIX[kind] == output.suffix]
        hint = f"; --type {' or '.join(others)} makes a *{output.suffix}" if others else ""
        raise DataError(f"--output {output}: --type {arguments.type} makes a *{suffix}{hint}")
    report = output.with_suffix(".report.json")
    for path in (output, report):
        if path.exists() and not arguments.force:
            raise DataError(f"{path} exists already; it is replaced only with --force")
    return output, report


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises DataError for numbers that can't be."""
    if arguments.sample_bytes < 1:
        raise DataError(f"--sample-bytes is {arguments.sample_bytes}; it must be at least 1")
    if not 0 <= arguments.held_out_share < 1:
        raise DataError(f"--held-out-share is {arguments.held_out_share}; it must be at least 0 and below 1")
    if not 0.98 <= arguments.character_coverage <= 1:
        raise DataError(f"--character-coverage is {arguments.character_coverage}; it must be from 0.98 to 1")


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Raises DataError for what is wrong with them or with the corpus."""
    output, report_path = output_of(arguments)
    check_numbers(arguments)
    started, recipe, corpus = time.monotonic(), recipe_of(arguments), Corpus(arguments)
    corpus.read()
    with ticking(f"train on {corpus.training.bytes / 1e6:.1f} MB", arguments.quiet or recipe.kind == "byte-bpe"):
        model = train(corpus.training, recipe, shown(arguments.quiet))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, [model])
    kind = "huggingface" if recipe.kind == "byte-bpe" else "sentencepiece"
    tokenizer = load_tokenizer(TokenizerSource(kind, str(output), recipe.end))
    with ticking("measure", arguments.quiet):
        groups = measure(tokenizer, {name: corpus.held_out[name] for name in sorted(corpus.held_out)})
    report = describe(arguments, recipe, corpus, model, groups)
    write_atomically(report_path, [json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n"])
    if not arguments.quiet:
        print(summary(output, tokenizer.vocab_size, recipe, corpus, time.monotonic() - started))
        print(table(groups) if groups else "no text was kept back to be measured; --held-out NAME=FILE names some")
    return 0


def describe(arguments: argparse.Namespace, recipe: Recipe, corpus: Corpus, model: bytes, groups: dict[str, Group]) -> dict:
    """The report: nothing in it depends on when, where or in which order it was made."""
    from importlib.metadata import version

    library = LIBRARY[recipe.kind]
    return {
        "type": recipe.kind, "sha256": hashlib.sha256(model).hexdigest(), "vocab_size": recipe.vocab_size, "eod": recipe.end,
        "special_tokens": list(recipe.special_tokens), "digits": recipe.digits, "megalm": __version__, library: version(library),
        "inputs": [{"path": source.path, "bytes": source.size} for source in sorted(corpus.sources, key=lambda file: file.path)],
        "documents": corpus.documents, "invalid_documents": corpus.skipped, "seed": arguments.seed,
        "sample": {"documents": len(corpus.training), "bytes": corpus.training.bytes,
                   "of_documents": corpus.training.offered, "of_bytes": corpus.training.offered_bytes},
        "held_out": {name: group.report() for name, group in groups.items()}, "held_out_together": together(groups).report(),
    }


def summary(output: Path, pieces: int, recipe: Recipe, corpus: Corpus, seconds: float) -> str:
    """What was done, in one line."""
    sample = corpus.training
    text = f"{output}: {pieces:,} pieces ({recipe.kind}) from {sample.bytes / 1e6:.1f} MB"
    if len(sample) < sample.offered:
        text += f", {len(sample):,} of {sample.offered:,} documents (--sample-bytes, --sample-documents)"
    if corpus.skipped:
        text += f"; {counted(corpus.skipped, 'invalid document')} skipped"
    return f"{text}, in {seconds:.0f} s"


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="megalm train-tokenizer", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--input", nargs="+", required=True, metavar="FILE",
        help=".jsonl, one JSON object a line, or .txt, also as .gz or .zst, or .parquet; globs and folders")
    add("--field", default="text", help="the JSON field that holds the text (text)")
    add("--vocab-size", type=int, required=True, metavar="N", help="pieces, special and byte pieces included")
    target = result.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="FILE", help="the model: *.model, of byte-bpe *.json")
    target.add_argument("--model-prefix", metavar="PREFIX", help="the same, without the suffix")
    add("--type", choices=tuple(SUFFIX), default="bpe", help="bpe and unigram are sentencepiece's (bpe)")
    add("--sample-bytes", "--max-bytes", type=int, default=256_000_000, metavar="N",
        help="of a larger corpus draw documents of so many bytes of text (256000000)")
    add("--sample-documents", type=positive, metavar="N", help="draw at most so many documents")
    add("--seed", type=int, default=1234, metavar="N", help="of the draw (1234)")
    add("--eod", metavar="TOKEN", help="the token that ends a document (</s>; byte-bpe: <|endoftext|>)")
    add("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="more tokens, such as <|user|>")
    add("--digits", choices=tuple(DIGITS), default="single",
        help="a piece has one digit, up to three (byte-bpe only), or any number (single)")
    add("--no-byte-fallback", dest="byte_fallback", action="store_false",
        help="sentencepiece: what no piece covers becomes <unk> instead of bytes, and is lost")
    add("--character-coverage", type=float, default=0.9995, metavar="X",
        help="sentencepiece: the share of all characters that get a piece of their own (0.9995)")
    add("--held-out", nargs="+", default=[], metavar="NAME=FILE", help="texts to measure bytes per token on: en=a.jsonl zh=b.txt")
    add("--held-out-share", type=float, default=0.01, metavar="X",
        help="without --held-out, keep back so much of the corpus to be measured (0.01)")
    add("--language-field", metavar="FIELD", help="the JSON field by which the texts kept back are reported")
    add("--encoding-errors", choices=ENCODING_ERRORS, default="stop",
        help="what isn't UTF-8 is an error, becomes U+FFFD, or leaves its document out (stop)")
    add("--skip-invalid", action="store_true", help="leave out and count what can't be read, instead of stopping")
    add("--force", action="store_true", help="replace an existing model")
    add("--quiet", action="store_true", help="print nothing but errors")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    return run(parser(), train_tokenizer, argv)


if __name__ == "__main__":
    sys.exit(main())
