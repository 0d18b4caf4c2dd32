"""Weights by part as a folder in Hugging Face's format, a few rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.disk import Disk
from megalm.checkpoint.foreign import Layout, join
from megalm.checkpoint.huggingface.families import layouts
from megalm.checkpoint.huggingface.read import CONFIG, part_shapes
from megalm.checkpoint.stream import FILE_BYTES, Reader, Streamed, blocks_of, groups_by_size, new_folder, safetensors_bytes
from megalm.config.schema import Model

FILE = "model.safetensors"


def write_huggingface(folder: Path, family: str, model: Model, weights: Reader, config: Mapping[str, Any],
                      files: Mapping[str, Path] | None = None, *, documents: Mapping[str, Mapping[str, Any]] | None = None,
                      dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES, disk: Disk | None = None) -> None:
    """Write config.json, the weights in files of about `file_bytes` and an index of them, copies of `files`, {name: file}, and
    `documents`, {name: JSON}.

    `model` has the vocabulary's true size: rows of its padding are left out. `dtype`: of all tensors; default: each one's own.
    Raises CheckpointError or OSError; then nothing is left.
    """
    disk, shapes = disk or Disk(), part_shapes(model)
    with new_folder(folder, disk) as temporary:
        tensors = [_streamed(layout, weights, shapes, dtype) for layout in layouts(family, model)]
        groups = groups_by_size(tensors, file_bytes)
        numbered = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        names = numbered if len(groups) > 1 else [FILE]
        for name, members in zip(names, groups, strict=True):
            disk.write(temporary / name, safetensors_bytes(members, {"format": "pt"}))
        if len(groups) > 1:
            weight_map = {tensor.name: name for name, members in zip(names, groups, strict=True) for tensor in members}
            index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
            disk.write(temporary / f"{FILE}.index.json", [_json(index)])
        for name, source in (files or {}).items():
            disk.write(temporary / name, [source.read_bytes()])
        for name, document in {**(documents or {}), CONFIG: config}.items():
            disk.write(temporary / name, [_json(document)])


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _streamed(layout: Layout, weights: Reader, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None) -> Streamed:
    part = layout.parts[0]
    dtype = dtype or weights.dtype(part)

    def blocks() -> Iterator[Tensor]:
        if len(layout.parts) == 1 and not layout.transposed:
            yield from blocks_of(weights, part, shapes[part][0], dtype)
        else:
            yield join(layout, weights, shapes).to(dtype)
            weights.release()

    return Streamed(layout.name, dtype, layout.shape(shapes), blocks)
