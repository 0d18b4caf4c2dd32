"""How well a tokenizer compresses text that it wasn't trained on: bytes per token, by group."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megalm.data.tokenizer import Tokenizer


@dataclass
class Group:
    """Counts of the texts of one name."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    tokens: int = 0
    lossless: int = 0  # documents that come back from their ids

    def add(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        self.documents += 1
        self.bytes += len(text.encode())
        self.characters += len(text)
        self.tokens += len(ids)
        self.lossless += tokenizer.decode(ids) == text

    def __iadd__(self, other: Group) -> Group:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def report(self) -> dict:
        """Everything of it for the JSON file; per token None where there is no token."""
        per_token = {f"{what}_per_token": round(getattr(self, what) / self.tokens, 4) if self.tokens else None
                     for what in ("bytes", "characters")}
        return vars(self) | per_token


def measure(tokenizer: Tokenizer, texts: Mapping[str, Iterable[str]]) -> dict[str, Group]:
    """The counts of each named group of texts."""
    groups = {name: Group() for name in texts}
    for name, group in groups.items():
        for text in texts[name]:
            group.add(tokenizer, text)
    return groups


def together(groups: Mapping[str, Group]) -> Group:
    """The sums."""
    whole = Group()
    for group in groups.values():
        whole += group
    return whole


def table(groups: Mapping[str, Group]) -> str:
    """One line a group, and their sum where there are several."""
    rows = [*groups.items()] + ([("together", together(groups))] if len(groups) > 1 else [])
    width = max(len("held out"), *(len(name) for name, _ in rows))
    lines = [f"{'held out':<{width}}  documents       bytes      tokens  bytes/token  chars/token  come back"]
    for name, group in rows:
        per_token = [f"{size / group.tokens:11.3f}" if group.tokens else f"{'-':>11}" for size in (group.bytes, group.characters)]
        back = f"{group.lossless / group.documents:9.2%}" if group.documents else f"{'-':>9}"
        counts = f"{group.documents:9,}  {group.bytes:10,}  {group.tokens:10,}"
        lines.append(f"{name:<{width}}  {counts}  {'  '.join(per_token)}  {back}")
    return "\n".join(lines)
