"""A folder in Hugging Face's format as weights by part: nothing is converted, and only what is asked for is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megalm.checkpoint.foreign import Foreign, Layout, Piece
from megalm.checkpoint.foreign.files import TensorFiles
from megalm.checkpoint.foreign.layout import check_tensors
from megalm.checkpoint.format import CheckpointError, read_json
from megalm.checkpoint.huggingface.families import is_buffer, layouts, model_of
from megalm.config import validate
from megalm.config.schema import Config, Model
from megalm.plan import make_plan
from megalm.plan.parameters import parts

CONFIG = "config.json"
BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
"""Files that go with the weights."""


@dataclass(frozen=True)
class HuggingFace:
    """An opened folder: its config.json, what that means here, and the weights."""

    folder: Path
    config: dict[str, Any]
    model: Model
    weights: Foreign

    @property
    def beside(self) -> list[Path]:
        """config.json and the files that go with it: the usual ones, and sentencepiece models of any name."""
        named = [path for name in (CONFIG, *BESIDE) if (path := self.folder / name).is_file()]
        return [*named, *(path for path in sorted(self.folder.glob("*.model")) if path.is_file() and path not in named)]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG}: a JSON object expected")
    return config


def open_huggingface(path: str | Path) -> HuggingFace:
    """Open a folder with config.json and weights. Raises CheckpointError, with every tensor that is missing or has no place."""
    folder = Path(path)
    config = read_config(folder)
    model = model_of(config, str(folder / CONFIG))
    files, shapes = TensorFiles(folder), part_shapes(model)
    # Heads and base models were saved by different classes: some files lack the first word of the names.
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(config["model_type"], "model.")
    found = [_renamed(layout, files, prefix) for layout in layouts(config["model_type"], model)]
    tied = "lm_head.weight" if model.tie_embeddings else None
    check_tensors(str(folder), found, shapes, files.shapes,
                  lambda name: is_buffer(name) or name in (tied, "embed_out.weight") and model.tie_embeddings)
    pieces: dict[str, list[Piece]] = {}
    for layout in found:
        for part, piece in layout.pieces(shapes, partial(files.open, layout.name)):
            pieces.setdefault(part, []).append(piece)
    return HuggingFace(folder, config, model, Foreign(str(folder), shapes, pieces))


def _renamed(layout: Layout, files: TensorFiles, prefix: str) -> Layout:
    short = layout.name.removeprefix(prefix)
    return replace(layout, name=short) if layout.name not in files.shapes and short in files.shapes else layout


def part_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every part of a model with its full shape, the vocabulary without padding."""
    config = run_config(model, "fp32")
    return {part.name: part.shape for part in parts(config, make_plan(config, 1))}


def run_config(model: Model, dtype: str, tokenizer: dict[str, Any] | None = None, folder: str = "none",
               vocab_multiple: int = 1) -> Config:
    """The config of a checkpoint that no run wrote: the model, by default without padding, on one rank; the rest is made up."""
    return validate({
        "model": model.model_dump(mode="json") | {"vocab_multiple": vocab_multiple}, "precision": {"dtype": dtype},
        "batch": {"micro": 1, "global": 1}, "optimizer": {"lr": 1e-4}, "tokenizer": tokenizer or {"type": "bytes"},
        "data": {"train": [{"path": "none"}]}, "train": {"dir": folder, "steps": 1},
    })  # fmt: skip
