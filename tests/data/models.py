"""Tiny tokenizers for the tests, trained on a few lines, and texts that are hard to bring back."""
from __future__ import annotations

import io
from pathlib import Path

TEXTS = [
    "def f(x):\n\treturn  x + 1234\n\n\n", "  leading and trailing  ", "", " ", "\n", "naïve café 你好 😀 \u0301",
    "a\r\nb\0c\u00a0d", "</s><s><unk>", "x" * 3000, "\ufeffmark",
]
LINES = [
    "def function(value):", "    return value + 1", "the quick brown fox jumps over the lazy dog", "import os, sys", "naïve café",
] * 40


def make_sentencepiece(path: Path, pieces: int = 320) -> Path:
    """A BPE model with byte pieces; eos is 2."""
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=pieces, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False)
    path.write_bytes(model.getvalue())
    return path


def make_huggingface(path: Path) -> Path:
    """A byte-level BPE of 300 tokens; <|endoftext|> is 1000, as in files whose ids have gaps."""
    import json

    import tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"],
        show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][0]["id"] = content["model"]["vocab"]["<|endoftext|>"] = 1000
    path.write_text(json.dumps(content))
    return path
