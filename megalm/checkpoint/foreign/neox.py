"""GPT-NeoX's checkpoints, written by DeepSpeed's pipeline: layer_LL-model_TT-model_states.pt, of layer LL and tp rank TT.

The layers are told apart by what they hold: numbers depend on how many layers without weights stand between. The fp32 masters
of ZeRO lie in other files, tied to the layout, which aren't read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.checkpoint.foreign.layout import Layout
from megalm.checkpoint.foreign.pickles import PickleFiles
from megalm.checkpoint.foreign.sharded import check_tied, merge
from megalm.checkpoint.foreign.weights import Foreign
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.huggingface.read import part_shapes
from megalm.config.schema import Model

ONCE = ("word_embeddings.", "position_embeddings.", "norm.", "final_linear.")


def open_neox(path: str | Path, model: Model) -> Foreign:
    """The weights of a checkpoint's folder (with `latest`) or step's, for this model. Raises CheckpointError."""
    folder, files = _step(Path(path)), PickleFiles()
    layers, tp = _layers(folder)
    views: dict[str, list] = {}
    number = 0
    for ranks in layers:
        contents = [_tensors(files.load(file), file) for file in ranks]
        is_layer = not all(name.startswith(ONCE) for name in contents[0])
        prefix = f"layers.{number}." if is_layer else ""
        number += is_layer
        for file, content in zip(ranks, contents, strict=True):
            for name in content:
                views.setdefault(prefix + name, []).append(partial(_open, files, file, name))
    if model.tie_embeddings:
        check_tied(str(folder), views.pop("final_linear.weight", []), views.get("word_embeddings.weight", []))
    return merge(str(folder), list(layouts(model)), part_shapes(model), views, tp, files.release)


def layouts(model: Model) -> Iterator[Layout]:
    """Every tensor of the model."""
    yield Layout("word_embeddings.weight", ("embedding.word.weight",), dim=0)
    if model.position_embedding == "learned":
        yield Layout("position_embeddings.weight", ("embedding.position.weight",))
    for i in range(model.num_layers):
        for suffix in ("weight", "bias"):
            ours, columns = f"layers.{i}", 1 if suffix == "weight" else None
            yield Layout(f"{ours}.input_layernorm.{suffix}", (f"{ours}.attention.norm.{suffix}",))
            yield Layout(f"{ours}.post_attention_layernorm.{suffix}", (f"{ours}.mlp.norm.{suffix}",))
            yield Layout(f"{ours}.mlp.dense_h_to_4h.{suffix}", (f"{ours}.mlp.up.{suffix}",), dim=0)
            yield Layout(f"{ours}.mlp.dense_4h_to_h.{suffix}", (f"{ours}.mlp.down.{suffix}",), dim=columns)
            if suffix == "weight" or model.bias:
                qkv = tuple(f"{ours}.attention.{part}.{suffix}" for part in ("query", "key", "value"))
                yield Layout(f"{ours}.attention.query_key_value.{suffix}", qkv, groups=model.num_attention_heads, dim=0)
                yield Layout(f"{ours}.attention.dense.{suffix}", (f"{ours}.attention.projection.{suffix}",), dim=columns)
    for suffix in ("weight", "bias"):
        yield Layout(f"norm.{suffix}", (f"final_norm.{suffix}",))
    if not model.tie_embeddings:
        yield Layout("final_linear.weight", ("head.weight",), dim=0)


def _step(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    latest = folder / "latest"
    name = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    return folder / name if re.fullmatch(r"[\w.-]+", name) and name not in (".", "..") else folder


def _layers(folder: Path) -> tuple[list[list[Path]], int]:
    """files[layer][tp rank] in the order of the layers, and tp. Raises CheckpointError where one is missing."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.glob("layer_*-model_*-model_states.pt"):
        match = re.fullmatch(r"layer_(\d+)-model_(\d+)-model_states\.pt", path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    if not found:
        raise CheckpointError(f"{folder}: no layer_*-model_*-model_states.pt here; a checkpoint that was written without a "
                              "pipeline (pipe_parallel_size 0) isn't supported")
    tp, numbers = max(rank for _, rank in found) + 1, sorted({layer for layer, _ in found})
    missing = [(layer, rank) for layer in numbers for rank in range(tp) if (layer, rank) not in found]
    if missing:
        raise CheckpointError(f"{folder}: layer_{missing[0][0]:02d}-model_{missing[0][1]:02d}-model_states.pt is missing")
    return [[found[layer, rank] for rank in range(tp)] for layer in numbers], tp


def _tensors(content: Any, file: Path) -> list[str]:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file}: there are no tensors in it")
    return [name for name, value in content.items() if isinstance(value, Tensor) and not name.endswith(
        ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"))]


def _open(files: PickleFiles, file: Path, name: str) -> Tensor:
    return files.load(file)[name]
