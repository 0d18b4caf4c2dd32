"""The one error of this package: a data set, a tokenizer or a text that can't be used."""
from __future__ import annotations


class DataError(ValueError):
    """The user's data is at fault. The message is one line: which file, what is wrong with it, what would be right."""
