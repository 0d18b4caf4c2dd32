"""What may be done to texts before they are tokenized, each by its flag: every document that is changed or left out is counted.

Each function of a text alone: so the result depends neither on the order of the work nor on the number of workers. Duplicates,
which depend on what came before, are marked here and left out where the parts come together (duplicates.py).
"""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from megalm.data.errors import DataError

# Private keys (PEM; of one cut short its lines, never the prose behind words that look like its beginning); keys of AWS, GitHub,
# Slack, Google, Stripe, OpenAI's form; JSON web tokens; "password = '...'" and such. None takes more than linear time.
SECRETS = re.compile(r"""
    -----BEGIN\ [A-Z ]{0,40}PRIVATE\ KEY-----(?:\s*(?:Proc-Type|DEK-Info):[^\n]{1,100})*
      (?:(?:[\s"',]|\\[nr]){0,40}[0-9A-Za-z+/=]{16,})*
      (?:(?:[\s"',]|\\[nr]){0,40}[0-9A-Za-z+/=]{0,15}(?:[\s"',]|\\[nr]){0,40}-----END\ [A-Z ]{0,40}PRIVATE\ KEY-----)?
  | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b
  | \bgh[pousr]_[0-9A-Za-z]{36,}\b | \bgithub_pat_[0-9A-Za-z_]{50,}
  | \bxox[abprs]-[0-9A-Za-z-]{10,}
  | \bAIza[0-9A-Za-z_-]{35}
  | \b[sr]k_(?:live|test)_[0-9A-Za-z]{16,} | \bsk-[0-9A-Za-z_-]{32,}
  | (?<![0-9A-Za-z_-])eyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.[0-9A-Za-z_-]{10,}
  | (?i:\b(?:api[_-]?key|secret(?:[_-]?key)?|access[_-]?token|auth[_-]?token|passw(?:or)?d)["']?\s*[:=]\s*["'])[^"'\s]{8,}(?=["'])
""", re.VERBOSE | re.DOTALL)
EMAILS = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b")
FILTERS = (("secrets", SECRETS, "[SECRET]"), ("emails", EMAILS, "[EMAIL]"))
NAMES = {"secrets": "secrets", "emails": "e-mail addresses"}
LANGUAGE_CHARACTERS = 4000  # of a text, that its language is told by
LETTERS = 20  # a text with fewer has no language, and stays


@dataclass(frozen=True)
class Cleaning:
    """The flags; nothing is on by default."""

    normalize: str | None = None  # NFC, NFKC
    secrets: str | None = None  # drop, redact
    emails: str | None = None
    languages: tuple[str, ...] = ()  # ISO 639-1
    min_characters: int = 0
    max_characters: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    deduplicate: bool = False
    near_duplicates: float | None = None  # the Jaccard similarity from which on a text is one

    @property
    def of_text(self) -> bool:
        """Is there anything to do before the text is tokenized?"""
        return bool(self.normalize or self.secrets or self.emails or self.languages or self.min_characters
                    or self.max_characters is not None)

    @property
    def of_tokens(self) -> bool:
        return bool(self.min_tokens or self.max_tokens is not None)


class Cleaner:
    """One text at a time: the text to go on with, or why it is left out."""

    def __init__(self, cleaning: Cleaning):
        """Raises DataError for a language that isn't known, or without the library that tells languages."""
        self.cleaning = cleaning
        self.language = language_teller(cleaning.languages) if cleaning.languages else None

    def __call__(self, text: str, changed: dict[str, int]) -> tuple[str | None, str]:
        """(the text, "") or (None, the reason). `changed` counts what was altered, by what."""
        cleaning = self.cleaning
        if cleaning.normalize and not unicodedata.is_normalized(cleaning.normalize, text):
            text = unicodedata.normalize(cleaning.normalize, text)
            count(changed, f"normalized to {cleaning.normalize}")
        for name, pattern, instead in FILTERS:
            wish = getattr(cleaning, name)
            if wish is None or (name == "emails" and "@" not in text):
                continue
            if wish == "drop":
                if pattern.search(text):
                    return None, f"with {NAMES[name]}"
                continue
            text, found = pattern.subn(instead, text)
            if found:
                count(changed, f"{NAMES[name]} redacted")
        if len(text) < cleaning.min_characters:
            return None, "too short"
        if cleaning.max_characters is not None and len(text) > cleaning.max_characters:
            return None, "too long"
        if self.language is not None and (language := self.language(text)) not in (None, *cleaning.languages):
            return None, f"in another language ({language})"
        return text, ""


def count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def language_teller(wanted: tuple[str, ...]) -> Callable[[str], str | None]:
    """A function from a text to its language; None for too few letters. Raises DataError for a code that it never gives."""
    try:
        from py3langid import langid
    except ImportError:
        raise DataError("--languages needs the py3langid package: pip install 'megalm[corpus]'") from None
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    known = set(identifier.labels)
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise DataError(f"--languages {','.join(unknown)}: known are {', '.join(sorted(known))}")

    def tell(text: str) -> str | None:
        head = text[:LANGUAGE_CHARACTERS]
        if sum(map(str.isalpha, head)) < LETTERS:
            return None
        return identifier.classify(head)[0]

    return tell
