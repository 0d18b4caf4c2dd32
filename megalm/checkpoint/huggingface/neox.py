"""GPT-NeoX (transformers' modeling_gpt_neox.py): in query_key_value q, k and v alternate by head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalm.checkpoint.foreign import Layout
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.huggingface.rope import read_rope, write_rope

ARCHITECTURE = "GPTNeoXForCausalLM"
ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}


def section(hf: Mapping[str, Any]) -> dict[str, Any]:
    """megalm's model section of a config.json. Raises CheckpointError for what isn't supported, KeyError for a missing key."""
    activation, bias = hf.get("hidden_act", "gelu"), bool(hf.get("attention_bias", True))
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"hidden_act: {activation!r} isn't supported; {', '.join(ACTIVATIONS)} are")
    fraction = (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    return {
        "num_layers": hf["num_hidden_layers"], "hidden_size": hf["hidden_size"], "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"], "vocab_size": hf["vocab_size"],
        "seq_length": hf.get("max_position_embeddings", 2048), "normalization": "layer_norm",
        "norm_eps": float(hf.get("layer_norm_eps", 1e-5)), "activation": ACTIVATIONS[activation],
        "position_embedding": "rotary", "rotary_fraction": float(fraction), **read_rope(hf),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)), "bias": bias, "qkv_bias": bias, "mlp_bias": True,
        "parallel_residual": bool(hf.get("use_parallel_residual", True)), "dropout": float(hf.get("hidden_dropout", 0.0)),
        "attention_dropout": float(hf.get("attention_dropout", 0.0)), "init_std": float(hf.get("initializer_range", 0.02)),
    }  # fmt: skip


def config(family: str, model: Any) -> dict[str, Any]:
    """config.json of a model that the family can express; `section` of it says whether it can."""
    rope = write_rope(model)
    return {
        "num_hidden_layers": model.num_layers, "hidden_size": model.hidden_size, "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size, "max_position_embeddings": model.seq_length, "layer_norm_eps": model.norm_eps,
        "hidden_act": "gelu" if model.activation == "gelu_exact" else "gelu_new", "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": rope["rope_theta"], **rope, "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.bias, "hidden_dropout": model.dropout, "attention_dropout": model.attention_dropout,
    }  # fmt: skip


def layouts(model: Any) -> Iterator[Layout]:
    """Every tensor of the model."""
    yield Layout("gpt_neox.embed_in.weight", ("embedding.word.weight",))
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        for suffix in ("weight", "bias"):
            yield Layout(f"{theirs}.input_layernorm.{suffix}", (f"{ours}.attention.norm.{suffix}",))
            yield Layout(f"{theirs}.post_attention_layernorm.{suffix}", (f"{ours}.mlp.norm.{suffix}",))
            yield Layout(f"{theirs}.mlp.dense_h_to_4h.{suffix}", (f"{ours}.mlp.up.{suffix}",))
            yield Layout(f"{theirs}.mlp.dense_4h_to_h.{suffix}", (f"{ours}.mlp.down.{suffix}",))
            if suffix == "weight" or model.bias:
                qkv = tuple(f"{ours}.attention.{part}.{suffix}" for part in ("query", "key", "value"))
                yield Layout(f"{theirs}.attention.query_key_value.{suffix}", qkv, groups=model.num_attention_heads)
                yield Layout(f"{theirs}.attention.dense.{suffix}", (f"{ours}.attention.projection.{suffix}",))
    for suffix in ("weight", "bias"):
        yield Layout(f"gpt_neox.final_layer_norm.{suffix}", (f"final_norm.{suffix}",))
    if not model.tie_embeddings:
        yield Layout("embed_out.weight", ("head.weight",))
