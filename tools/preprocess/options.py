"""The command line of megalm preprocess; imports nothing that takes time."""
from __future__ import annotations

import argparse

from megalm.data.tokenizer import TYPES
from megalm.tools._command import Parser, natural, positive

ENCODING_ERRORS = ("stop", "replace", "drop")


def cleaning(result: Parser) -> None:
    """The flags of cleaning.py and duplicates.py; all are off by default."""
    group = result.add_argument_group("cleaning", "off unless asked for; what is changed or left out is counted in the report")
    add = group.add_argument
    add("--normalize", choices=("NFC", "NFKC"), help="Unicode normalization")
    add("--secrets", choices=("drop", "redact"), help="private keys, access keys, tokens, passwords in code: drop the document, "
        "or put [SECRET] in their place")
    add("--emails", choices=("drop", "redact"), help="e-mail addresses, likewise: [EMAIL]")
    add("--languages", type=lambda text: tuple(text.split(",")), default=(), metavar="en,zh",
        help="leave out documents in other languages (codes of ISO 639-1; fewer than 20 letters: stays)")
    add("--min-characters", type=positive, default=0, metavar="N", help="leave out shorter documents")
    add("--max-characters", type=positive, metavar="N", help="leave out longer documents")
    add("--min-tokens", type=positive, default=0, metavar="N", help="leave out shorter documents; the end of document counts")
    add("--max-tokens", type=positive, metavar="N", help="leave out longer documents")
    add("--deduplicate", action="store_true", help="leave out documents that came before (16 bytes of memory for each other)")
    add("--near-duplicates", type=share, nargs="?", const=0.8, metavar="SIMILARITY",
        help="leave out documents that share so much of their runs of five words with an earlier one: MinHash's estimate (0.8; "
             "for each other 240 bytes of memory and 512 of disk; of a text of more than 4 million characters the head counts)")
    add("--report", metavar="FILE.json", help="what came in, went out and why; beside it a table (.txt) and the lengths (.png)")


def share(text: str) -> float:
    """The type of --near-duplicates."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a similarity above 0 and at most 1")
    return value


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="megalm preprocess", description="Text to tokens: JSON lines, plain text or parquet to .bin and .idx. "
                    "Stopped in any way, the same command goes on.")
    add = result.add_argument
    add("--input", nargs="+", required=True, metavar="NAME",
        help=".jsonl (one object a line), .txt (one document a file), either with .gz or .zst, .parquet; files, folders, globs, "
             "- for JSON lines, compressed or not, on standard input")
    add("--output", required=True, metavar="PREFIX", help="data/wiki writes data/wiki.bin, .idx and .data.json")
    add("--tokenizer", required=True, metavar="PATH|bytes", help="a sentencepiece .model, a tokenizer.json, or the word bytes")
    add("--tokenizer-type", choices=TYPES, help="where the path doesn't say it")
    add("--eod", metavar="TOKEN", help="the token that ends a document: needed for a tokenizer.json (sentencepiece: eos)")
    add("--no-append-eod", dest="append_eod", action="store_false", help="don't end documents with that token")
    add("--special-tokens", action="store_true", help="where a text holds that of a special token of a tokenizer.json, such as "
        "<|endoftext|>, it becomes that token, as in Megatron-LM; else it stays text, as sentencepiece has it")
    add("--field", default="text", help="the JSON field, or the column, that holds the text (text)")
    add("--split-sentences", action="store_true", help="each sentence is a sequence of its document, for data of BERT's kind")
    add("--workers", type=positive, default=1, metavar="N", help="processes; the output doesn't depend on it (1)")
    add("--piece-bytes", type=positive, metavar="N",
        help="of text that a worker does at a time: what is done again, for each, after a stop (a 256th of the input's bytes, "
             "but at least 16777216 and at most 67108864)")
    add("--check-documents", type=natural, default=2000, metavar="N",
        help="the fast tokenizer is used if it gives the ids of the reference on N documents of the corpus, the longest and "
             "strangest of 64 places among them (2000; parts stand for very long ones); 0: the reference tokenizes")
    add("--verify", action="store_true", help="compare the two on every document; the reference's ids are written")
    add("--encoding-errors", choices=ENCODING_ERRORS, default="stop",
        help="text that isn't UTF-8, or half a surrogate pair: stop, put U+FFFD in its place, or drop the document (stop)")
    add("--skip-invalid", action="store_true",
        help="leave out, report and count documents that can't be read, instead of stopping; a damaged file still stops it")
    cleaning(result)
    add("--restart", action="store_true", help="begin anew, whatever an earlier run has left in PREFIX.work")
    add("--force", action="store_true", help="replace an existing data set")
    add("--quiet", action="store_true", help="print nothing but errors")
    return result
