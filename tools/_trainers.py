"""The tokenizer trainers, sentencepiece (bpe, unigram) and byte-level BPE: the same texts in one order give the same bytes."""
from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megalm.data.errors import DataError

MAX_SENTENCE = 8192  # bytes; sentencepiece's trainer leaves out what is longer
THREADS = 4  # a fixed number: unigram sums in an order that depends on it
BYTES = 256
SUFFIX = {"bpe": ".model", "unigram": ".model", "byte-bpe": ".json"}
EOD = {"bpe": "</s>", "unigram": "</s>", "byte-bpe": "<|endoftext|>"}
DIGITS = {"single": r"\p{N}", "triples": r"\p{N}{1,3}", "keep": r" ?\p{N}+"}


@dataclass(frozen=True)
class Recipe:
    """What is trained."""

    kind: str  # a key of SUFFIX
    vocab_size: int
    eod: str | None = None  # None: the usual one
    special_tokens: tuple[str, ...] = field(default=())
    digits: str = "single"
    byte_fallback: bool = True  # sentencepiece; byte-level BPE needs none
    character_coverage: float = 0.9995  # sentencepiece

    @property
    def end(self) -> str:
        return self.eod or EOD[self.kind]

    @property
    def base(self) -> int:
        """Entries that there are whatever the texts."""
        first = 1 if self.kind == "byte-bpe" else 3
        return first + len(self.special_tokens) + (BYTES if self.byte_fallback or self.kind == "byte-bpe" else 0)

    def check(self) -> None:
        """Raises DataError for what can't be."""
        if self.digits == "triples" and self.kind != "byte-bpe":
            raise DataError(f"--digits triples: sentencepiece ({self.kind}) can't; --type byte-bpe can")
        tokens = [self.end, *self.special_tokens]
        twice = [token for token in tokens if tokens.count(token) > 1 or not token]
        if twice:
            raise DataError(f"the special token {twice[0]!r} is {'empty' if not twice[0] else 'named twice'}")
        if self.kind != "byte-bpe" and (reserved := {"<unk>", "<s>"}.intersection(tokens)):
            raise DataError(f"{min(reserved)} is a piece of every sentencepiece model already")
        if self.vocab_size <= self.base:
            raise DataError(f"--vocab-size {self.vocab_size}: the {self.base} special and byte pieces alone need more")


def train(texts: Iterable[str], recipe: Recipe, show_progress: bool = False) -> bytes:
    """The content of the model's file. Raises DataError if the texts don't give so many entries."""
    return train_byte_bpe(texts, recipe, show_progress) if recipe.kind == "byte-bpe" else train_sentencepiece(texts, recipe)


def sentences(text: str) -> Iterator[str]:
    """The lines of a text, long ones in pieces: what sentencepiece's trainer takes."""
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_SENTENCE // 4):  # a character has at most 4 bytes
            yield line[start:start + MAX_SENTENCE // 4]


def train_sentencepiece(texts: Iterable[str], recipe: Recipe) -> bytes:
    """A .model that changes no text; ids: <unk>, <s>, the end of document, the special tokens, bytes, pieces."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for text in texts for sentence in sentences(text)), model_writer=model,
            model_type=recipe.kind, vocab_size=recipe.vocab_size, eos_piece=recipe.end,
            control_symbols=list(recipe.special_tokens), byte_fallback=recipe.byte_fallback,
            split_digits=recipe.digits == "single", allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
            add_dummy_prefix=False, normalization_rule_name="identity",
            character_coverage=recipe.character_coverage, max_sentence_length=MAX_SENTENCE, num_threads=THREADS, minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(explain(str(error), recipe.vocab_size)) from error
    return model.getvalue()


def explain(failure: str, vocab_size: int) -> str:
    """sentencepiece's own error, in words of this program where it is one of the two that users meet."""
    too_high = re.search(r"Vocabulary size (?:is )?too high.*?<= (\d+)", failure, re.DOTALL)
    if too_high:
        return too_large(vocab_size, int(too_high[1]))
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", failure)
    if too_small:
        return f"--vocab-size {vocab_size} is too small for this corpus: its characters and byte pieces alone are {too_small[1]}"
    return f"sentencepiece: {failure}"


def too_large(vocab_size: int, most: int) -> str:
    return f"--vocab-size {vocab_size} is too large for this corpus, which gives at most {most} pieces"


def split_pattern(digits: str) -> str:
    """The units in which byte-level BPE merges, as a regular expression.

    Those of Qwen's tokenizers that hold marks of the script together with their letters (single digits) and of OpenAI's
    o200k_base (triples), rather than ones of our own: fast tokenizers know them by their text.
    """
    before, spaces = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"  # a space or a mark belongs to the word behind it
    if digits == "triples":
        ends = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
        words = f"{before}{upper}*{lower}+{ends}|{before}{upper}+{lower}*{ends}"
        return rf"{words}|{DIGITS[digits]}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{spaces}"
    ends, marks = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    return rf"{ends}|{before}[\p{{L}}\p{{M}}]+|{DIGITS[digits]}|{marks}|{spaces}"


def train_byte_bpe(texts: Iterable[str], recipe: Recipe, show_progress: bool) -> bytes:
    """A tokenizer.json; ids: the end of document, the special tokens, the 256 bytes, then the merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(split_pattern(recipe.digits)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size, min_frequency=2, special_tokens=[recipe.end, *recipe.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=show_progress)
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size < recipe.vocab_size:
        raise DataError(too_large(recipe.vocab_size, size))
    return (json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1) + "\n").encode()
