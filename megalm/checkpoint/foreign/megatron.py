"""Megatron-LM's checkpoints of the format `torch`: mp_rank_TT[_PPP]/model_optim_rng.pt, of tp rank TT and stage PPP.

Both namings of the model are read: Megatron Core's, norms inside linear layers or not, and the older language_model's, whose
q, k and v alternate by head since checkpoint version 2. The names below are Core's with norms of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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

FILES = ("model_optim_rng.pt", "model_rng.pt")
RENAMED = (
    (r"^language_model\.", ""), (r"^(encoder|transformer)\.", "decoder."), (r"^word_embeddings_for_head\..*", ""),
    (r"linear_qkv\.layer_norm_(weight|bias)$", r"LAYER.input_layernorm.\1"),
    (r"linear_fc1\.layer_norm_(weight|bias)$", r"LAYER.pre_mlp_layernorm.\1"),
    (r"(self_attention|mlp)\.LAYER\.", ""), (r"\.attention\.", ".self_attention."), (r"query_key_value", "linear_qkv"),
    (r"self_attention\.dense\.", "self_attention.linear_proj."), (r"dense_h_to_4h", "linear_fc1"),
    (r"dense_4h_to_h", "linear_fc2"), (r"post_attention_layernorm", "pre_mlp_layernorm"),
)  # fmt: skip
"""Every other naming to the one of the layouts, in this order."""
ARGUMENTS = {"num_attention_heads": "num_attention_heads", "norm_epsilon": "norm_eps", "layernorm_epsilon": "norm_eps",
             "rotary_base": "rotary_theta", "rotary_percent": "rotary_fraction"}
"""What the file's own arguments say of the model that shapes don't tell."""
UNSUPPORTED = {"apply_layernorm_1p": False, "num_experts": None, "rotary_interleaved": False,
               "apply_residual_connection_post_layernorm": False}


def open_megatron(path: str | Path, model: Model) -> Foreign:
    """The weights of a checkpoint's folder (with latest_checkpointed_iteration.txt) or iteration's, for this model.

    Raises CheckpointError for what can't be read or isn't this model.
    """
    folder, files = _iteration(Path(path)), PickleFiles()
    ranks, tp = _ranks(folder)
    views: dict[str, list] = {}
    first_layer = 0
    for stage in ranks:
        layers = 0
        for file in stage:
            content = files.load(file)
            _check(content, file, model)
            for key, name in _names(content["model"]).items():
                number = re.match(r"decoder\.layers\.(\d+)\.", name)
                if number:
                    layers = max(layers, int(number[1]) + 1)
                    name = f"decoder.layers.{int(number[1]) + first_layer}.{name[number.end():]}"
                views.setdefault(name, []).append(partial(_open, files, file, key))
        first_layer += layers
    if model.tie_embeddings:
        check_tied(str(folder), views.pop("output_layer.weight", []), views.get("embedding.word_embeddings.weight", []))
    return merge(str(folder), list(layouts(model)), part_shapes(model), views, tp, files.release)


def layouts(model: Model) -> Iterator[Layout]:
    """Every tensor of the model."""
    yield Layout("embedding.word_embeddings.weight", ("embedding.word.weight",), dim=0)
    if model.position_embedding == "learned":
        yield Layout("embedding.position_embeddings.weight", ("embedding.position.weight",))
    norm = ("weight", "bias") if model.normalization == "layer_norm" else ("weight",)
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"decoder.layers.{i}"
        for suffix in norm:
            yield Layout(f"{theirs}.input_layernorm.{suffix}", (f"{ours}.attention.norm.{suffix}",))
            yield Layout(f"{theirs}.pre_mlp_layernorm.{suffix}", (f"{ours}.mlp.norm.{suffix}",))
            for which, name in (("query", "q"), ("key", "k")) if model.qk_norm else ():
                yield Layout(f"{theirs}.self_attention.{name}_layernorm.{suffix}", (f"{ours}.attention.{which}_norm.{suffix}",))
        for suffix in ("weight", "bias") if model.qkv_bias else ("weight",):
            qkv = tuple(f"{ours}.attention.{part}.{suffix}" for part in ("query", "key", "value"))
            yield Layout(f"{theirs}.self_attention.linear_qkv.{suffix}", qkv, groups=model.num_query_groups, dim=0)
        wide = ("gate", "up") if model.gated else ("up",)
        for suffix in ("weight", "bias") if model.mlp_bias else ("weight",):
            yield Layout(f"{theirs}.mlp.linear_fc1.{suffix}", tuple(f"{ours}.mlp.{part}.{suffix}" for part in wide), dim=0)
            yield Layout(f"{theirs}.mlp.linear_fc2.{suffix}", (f"{ours}.mlp.down.{suffix}",),
                         dim=1 if suffix == "weight" else None)
        for suffix in ("weight", "bias") if model.bias else ("weight",):
            yield Layout(f"{theirs}.self_attention.linear_proj.{suffix}", (f"{ours}.attention.projection.{suffix}",),
                         dim=1 if suffix == "weight" else None)
    for suffix in norm:
        yield Layout(f"decoder.final_layernorm.{suffix}", (f"final_norm.{suffix}",))
    if not model.tie_embeddings:
        yield Layout("output_layer.weight", ("head.weight",), dim=0)


def _iteration(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    latest = folder / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        text = latest.read_text(encoding="utf-8", errors="replace").strip()
        folder /= f"iter_{int(text):07d}" if text.isdigit() else "release"
    if (folder / ".metadata").exists() or (folder / "metadata.json").exists():
        raise CheckpointError(f"{folder}: the format torch_dist isn't supported: its index is a pickle that can't be read "
                              "safely; Megatron-LM writes the format torch with --ckpt-format torch")
    return folder


def _ranks(folder: Path) -> tuple[list[list[Path]], int]:
    """files[stage][tp rank], and tp. Raises CheckpointError where one is missing."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.glob("mp_rank_*"):
        match = re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?", path.name)
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if match and file:
            found[int(match[2] or 0), int(match[1])] = file
    if not found:
        raise CheckpointError(f"{folder}: no mp_rank_*/{FILES[0]} here")
    pp, tp = (max(place[axis] for place in found) + 1 for axis in (0, 1))
    missing = [(stage, rank) for stage in range(pp) for rank in range(tp) if (stage, rank) not in found]
    if missing:
        raise CheckpointError(f"{folder}: the files of stage {missing[0][0]}, tp rank {missing[0][1]} are missing")
    return [[found[stage, rank] for rank in range(tp)] for stage in range(pp)], tp


def _check(content: Any, file: Path, model: Model) -> None:
    """It is a model of this kind. Raises CheckpointError with every difference that its arguments tell."""
    content = content if isinstance(content, Mapping) else {}
    if "model0" in content:
        raise CheckpointError(f"{file}: a virtual pipeline (model0, model1) isn't supported")
    if not isinstance(content.get("model"), Mapping):
        raise CheckpointError(f"{file}: there is no model in it")
    if not 2 <= content.get("checkpoint_version", 0) < 4:
        raise CheckpointError(f"{file}: checkpoint version {content.get('checkpoint_version')} isn't supported; 2 and 3 are")
    arguments = getattr(content.get("args"), "__dict__", {})
    problems = [f"{key} {arguments[key]} isn't supported" for key, only in UNSUPPORTED.items()
                if arguments.get(key, only) != only]
    problems += [f"model.{ours}: {getattr(model, ours)!r} here, {arguments[theirs]!r} there" for theirs, ours in ARGUMENTS.items()
                 if arguments.get(theirs) is not None and float(arguments[theirs]) != float(getattr(model, ours))
                 and (not ours.startswith("rotary") or model.position_embedding == "rotary")]
    if problems:
        raise CheckpointError(f"{file}: " + "; ".join(problems))


def _names(state: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """{keys that lead to a tensor: its name in the layouts} of what is a weight."""
    found = {}
    for keys, value in _leaves(state, ()):
        name = ".".join(keys)
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if isinstance(value, Tensor) and name and not name.endswith(("_extra_state", "inv_freq")):
            found[keys] = name
    return found


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*keys, str(key)))
    else:
        yield keys, value


def _open(files: PickleFiles, file: Path, keys: tuple[str, ...]) -> Tensor:
    value = files.load(file)["model"]
    for key in keys:
        value = value[key]
    return value
