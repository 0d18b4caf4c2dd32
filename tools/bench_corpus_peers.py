"""What megalm preprocess is compared with: the plain loops that people write, one process each, from JSON lines to .bin and .idx.

    python -m megalm.tools.bench_corpus_peers tokenizers corpus.jsonl out tokenizer.json '<|endoftext|>'
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megalm.data.indexed import IndexedWriter, token_dtype

# Qwen's, https://github.com/QwenLM/Qwen/blob/main/tokenization_note.md: a .tiktoken file doesn't say how words are told apart.
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def texts(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def with_tokenizers(model: str, eod: str) -> tuple[Callable[[str], list[int]], int, int]:
    """(text to ids, end of document, entries of the vocabulary) of Hugging Face's library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(model)
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode, tokenizer.token_to_id(eod), tokenizer.get_vocab_size()


def with_sentencepiece(model: str, eod: str) -> tuple[Callable[[str], list[int]], int, int]:
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=model)
    return tokenizer.encode, tokenizer.eos_id(), tokenizer.get_piece_size()


def plain(encode, eod: int, size: int, corpus: str, output: str) -> None:
    """One document after the other, written by megalm's writer, which costs next to nothing."""
    with IndexedWriter(output, token_dtype(size)) as writer:
        for text in texts(corpus):
            ids = encode(text)
            writer.add_document(ids + [eod] if ids else [], None if ids else [])


def megatron(encode, eod: int, size: int, corpus: str, output: str) -> None:
    """As Megatron-LM's tools/preprocess_data.py with --workers 1 --append-eod: its builder, a tensor a document."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(size))
    for text in texts(corpus):
        ids = encode(text)
        ids = ids + [eod] if ids else ids
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{output}.idx")


def from_tiktoken(path: Path, folder: Path) -> Path:
    """Qwen's .tiktoken file as a tokenizer.json."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converted = TikTokenConverter(vocab_file=str(path), pattern=QWEN, extra_special_tokens=special).converted()
    converted.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def main(name: str, corpus: str, output: str, model: str, eod: str) -> None:
    loaded = (with_sentencepiece if model.endswith((".model", ".v1", ".v2", ".v3")) else with_tokenizers)(model, eod)
    (megatron if name == "megatron-core" else plain)(*loaded, corpus, output)


def same(one: str, other: str) -> bool:
    """Are two data sets the same, byte for byte?"""
    return all(np.array_equal(np.memmap(f"{one}.{suffix}", np.uint8, "r"), np.memmap(f"{other}.{suffix}", np.uint8, "r"))
               for suffix in ("bin", "idx"))


if __name__ == "__main__":
    main(*sys.argv[1:])
