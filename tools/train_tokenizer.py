"""Train a sentencepiece tokenizer on JSON lines or plain text: the same text gives the same bytes.

    megalm train-tokenizer --input a.jsonl --vocab-size 32000 --output data/spm.model

Nothing is normalised: a text comes back from its ids as it was (but for U+2581, which sentencepiece uses for the space). Spaces
are kept, digits are split, and what no piece covers, line ends included, is spelled in byte pieces.
"""
from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalm.data.documents import check_inputs, read_batches, read_text
from megalm.data.errors import DataError
from megalm.data.publish import write_atomically
from megalm.data.tokenizer import SentencePieceTokenizer
from megalm.tools._command import Parser, run

MAX_SENTENCE = 8192  # bytes; the trainer leaves out what is longer
THREADS = 4  # a fixed number: unigram sums in an order that depends on it
SPECIAL_PIECES = 3 + 256  # <unk>, <s>, </s> and the bytes


def sentences(text: str) -> Iterator[str]:
    """The lines of a text, long ones in pieces: what the trainer takes."""
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_SENTENCE // 4):  # a character has at most 4 bytes
            yield line[start:start + MAX_SENTENCE // 4]


class Corpus:
    """The sentences of the input files. Of a corpus larger than `max_bytes` an even part of its documents is taken."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.part = min(1.0, arguments.max_bytes / max(1, check_inputs(arguments.input)))
        self.documents = self.used = self.characters = self.skipped = 0
        self.problem: Exception | None = None  # the trainer puts an error of its own in its place

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts():
                self.documents += 1
                if int(self.documents * self.part) > int((self.documents - 1) * self.part):
                    self.used += 1
                    self.characters += len(text)
                    yield from sentences(text)
        except Exception as error:
            self.problem = error
            raise

    def _texts(self) -> Iterator[str]:
        for batch in read_batches(self.arguments.input):
            for place in range(len(batch.documents)):
                try:
                    yield read_text(batch, place, self.arguments.field)
                except DataError as error:
                    if not self.arguments.skip_invalid:
                        raise DataError(f"{error}; --skip-invalid leaves such documents out") from error
                    self.skipped += 1


def train(corpus: Corpus, kind: str, vocab_size: int) -> bytes:
    """The model's bytes. Raises DataError if the corpus has no text or doesn't give so many pieces."""
    import sentencepiece

    model = io.BytesIO()
    failure = ""
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=model, model_type=kind, vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
            add_dummy_prefix=False, normalization_rule_name="identity", character_coverage=0.9995,
            max_sentence_length=MAX_SENTENCE, num_threads=THREADS, minloglevel=2,
        )
    except RuntimeError as error:
        failure = str(error)
    if corpus.problem is not None:
        raise corpus.problem
    if corpus.characters == 0:
        raise DataError(f"no text in {', '.join(corpus.arguments.input)}: {corpus.documents} documents")
    if failure:
        raise DataError(explain(failure, vocab_size))
    return model.getvalue()


def explain(failure: str, vocab_size: int) -> str:
    """The trainer's own error, in words of this program where it is one of the two that users meet."""
    too_high = re.search(r"Vocabulary size (?:is )?too high.*?<= (\d+)", failure, re.DOTALL)
    if too_high:
        return f"--vocab-size {vocab_size} is too large for this corpus, which gives at most {too_high[1]} pieces"
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", failure)
    if too_small:
        return f"--vocab-size {vocab_size} is too small for this corpus: its characters and byte pieces alone are {too_small[1]}"
    return f"sentencepiece: {failure}"


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Raises DataError for what is wrong with them or with the corpus."""
    output = Path(arguments.output or f"{arguments.model_prefix}.model")
    if output.suffix != ".model":
        raise DataError(f"--output {output}: a sentencepiece model is named *.model")
    if output.exists() and not arguments.force:
        raise DataError(f"{output} exists already; it is replaced only with --force")
    if arguments.vocab_size <= SPECIAL_PIECES:
        raise DataError(f"--vocab-size {arguments.vocab_size}: the {SPECIAL_PIECES} special and byte pieces alone need more")
    if arguments.max_bytes < 1:
        raise DataError(f"--max-bytes is {arguments.max_bytes}; it must be at least 1")
    started, corpus = time.monotonic(), Corpus(arguments)
    model = train(corpus, arguments.type, arguments.vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, [model])
    pieces = SentencePieceTokenizer(output).vocab_size
    text = f"{output}: {pieces:,} pieces ({arguments.type}) from {corpus.characters / 1e6:.1f} million characters"
    if corpus.used < corpus.documents:
        text += f", {corpus.used:,} of {corpus.documents:,} documents (--max-bytes)"
    if corpus.skipped:
        text += f"; {corpus.skipped:,} invalid documents skipped"
    print(f"{text}, in {time.monotonic() - started:.0f} s")
    return 0


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="megalm train-tokenizer", description=__doc__.splitlines()[0])
    result.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl, one JSON object a line, or .txt")
    result.add_argument("--field", default="text", help="the JSON field that holds the text (text)")
    result.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, special and byte pieces included")
    target = result.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="FILE", help="the model, *.model")
    target.add_argument("--model-prefix", metavar="PREFIX", help="the same, without .model")
    result.add_argument("--type", choices=("bpe", "unigram"), default="bpe")
    result.add_argument("--max-bytes", type=int, default=256_000_000, metavar="N",
                        help="of a larger corpus take an even part of the documents, about so many bytes (256000000)")
    result.add_argument("--skip-invalid", action="store_true", help="leave out and count what can't be read, instead of stopping")
    result.add_argument("--force", action="store_true", help="replace an existing model")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    return run(parser(), train_tokenizer, argv)


if __name__ == "__main__":
    sys.exit(main())
