"""What tokenizer_config.json must say so that transformers makes of a run's tokenizer file the tokenizer that the run used.

Without it, transformers takes the class of the model's family, which cuts text in its own way: other ids, and no error.
"""

from __future__ import annotations

from typing import Any

from megalm.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

GENERIC, SENTENCEPIECE_BPE = "PreTrainedTokenizerFast", "LlamaTokenizer"
"""The classes that add nothing of their own to a file; the second reads the merges of a sentencepiece model."""
OWN_CLASS = "qwen2"
"""Whose class transformers takes whatever the files say."""
SPACE = "\u2581"
CHANGED_BY_RULES = " \ufb01  \xbd\n"
"""No rule of sentencepiece's but identity leaves this as it is, nor do a space in front and the removal of spaces."""


def tokenizer_config(tokenizer: Tokenizer, seq_length: int) -> dict[str, Any] | None:
    """The file's content; None for a tokenizer that has no file."""
    common = {"model_max_length": seq_length, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, SentencePieceTokenizer):
        return common | _of_pieces(tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    end = {} if tokenizer.eod is None else {"eos_token": tokenizer.token(tokenizer.eod)}
    return {"tokenizer_class": GENERIC, **common, **end}


def tokenizer_doubt(tokenizer: Tokenizer, family: str) -> str | None:
    """Why transformers may cut text otherwise nevertheless, in one line; None: it doesn't."""
    if family == OWN_CLASS and tokenizer.files():
        return f"transformers' AutoTokenizer cuts text its own way for {family}; {GENERIC}.from_pretrained does it the file's"
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    if _model(tokenizer).normalize(CHANGED_BY_RULES) != CHANGED_BY_RULES.replace(" ", SPACE):
        return "it changes text before it cuts it, and transformers may do that otherwise: compare ids before you rely on them"
    return None


def _model(tokenizer: SentencePieceTokenizer) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))


def _of_pieces(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Of a sentencepiece model. No token is added to a text, as none was in training."""
    model = _model(tokenizer)
    ends = {"eos_token": tokenizer.eod, "unk_token": model.unk_id(), "bos_token": model.bos_id()}
    named = {key: model.id_to_piece(number) for key, number in ends.items() if number is not None and number >= 0}
    # The scores of a BPE model are the places of its merges, those of a unigram model logarithms of probabilities.
    merges = all(model.get_score(number).is_integer() for number in range(model.get_piece_size()))
    return {"tokenizer_class": SENTENCEPIECE_BPE if merges else GENERIC, "legacy": False, "add_bos_token": False,
            "add_eos_token": False, "add_prefix_space": model.normalize("a") == f"{SPACE}a", **named}
