"""Sentences of a text by rules, for data of BERT's kind: every character of the text is in one of them, in order."""
from __future__ import annotations

import re

ABBREVIATIONS = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "etc", "e.g", "i.e", "cf", "al", "fig", "eq", "no",
     "nos", "vol", "pp", "ch", "sec", "dept", "inc", "ltd", "co", "corp", "gen", "col", "lt", "sgt", "capt",
     "rev", "hon", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "a.m",
     "p.m", "u.s", "u.k", "ph.d", "approx", "est", "ca", "resp"])
CLOSING = "\"'\u201d\u2019\u00bb)\\]}"
# Western marks end a sentence where space and then something that may begin one follow; Chinese, Japanese, Devanagari, Arabic
# and Urdu marks do by themselves; an empty line always does.
END = re.compile(
    rf"(?P<mark>[.!?\u2026]+[{CLOSING}]*)\s+(?=[^\W_a-z]|[\"'\u201c\u2018\u00ab(\[\-*\u2022])"
    rf"|[\u3002\uff01\uff1f\u0964\u0965\u06d4\u061f]+[{CLOSING}\u300d\u300f\uff09]*\s*"
    r"|\n[^\S\n]*\n\s*")


def split_sentences(text: str) -> list[str]:
    """The sentences, without the space around them; none is empty."""
    sentences, start = [], 0
    for match in END.finditer(text):
        if match["mark"] == "." and abbreviation(text, start, match.start()):
            continue
        sentences.append(text[start:match.end()].strip())
        start = match.end()
    return [sentence for sentence in (*sentences, text[start:].strip()) if sentence]


def abbreviation(text: str, start: int, end: int) -> bool:
    """Does the word before a full stop usually have one, or is it an initial?"""
    words = text[max(start, end - 24):end].split()
    word = words[-1].lstrip("([\"'") if words else ""
    return word.lower() in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word.isupper())
