"""Llama, Mistral, Qwen2 and Qwen3: one architecture with different defaults (transformers' modeling_*.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalm.checkpoint.foreign import Layout
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.huggingface.rope import read_rope, write_rope

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
# What a key that config.json leaves out means, where the four differ.
MISSING = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768, "max_window_layers": 28,
              "head_dim": 128},
}
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu_fast": "geglu"}
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def section(hf: Mapping[str, Any]) -> dict[str, Any]:
    """megalm's model section of a config.json. Raises CheckpointError for what isn't supported, KeyError for a missing key."""
    family = hf["model_type"]
    hf = {**MISSING[family], **hf}
    heads, activation = hf["num_attention_heads"], hf.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"hidden_act: {activation!r} isn't supported; {', '.join(ACTIVATIONS)} are")
    bias = bool(hf.get("attention_bias", False)) and family in ("llama", "qwen3")
    return {
        "num_layers": hf["num_hidden_layers"], "hidden_size": hf["hidden_size"], "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads, "ffn_hidden_size": hf["intermediate_size"],
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "seq_length": hf["max_position_embeddings"], "vocab_size": hf["vocab_size"],
        "normalization": "rms_norm", "norm_eps": float(hf.get("rms_norm_eps", 1e-6)), "activation": ACTIVATIONS[activation],
        "position_embedding": "rotary", **read_rope(hf), "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "bias": bias, "qkv_bias": bias or family == "qwen2", "mlp_bias": bool(hf.get("mlp_bias", False)) and family == "llama",
        "qk_norm": family == "qwen3", "sliding_window": _window(family, hf),
        "attention_dropout": float(hf.get("attention_dropout", 0.0)), "init_std": float(hf.get("initializer_range", 0.02)),
    }  # fmt: skip


def _window(family: str, hf: Mapping[str, Any]) -> int | None:
    """model.sliding_window, one for all layers."""
    if family == "llama" or family != "mistral" and not hf.get("use_sliding_window", False):
        return None
    window, layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    if family == "mistral" or window is None:
        return window
    kinds = set(hf.get("layer_types") or ["full_attention" if i < hf["max_window_layers"] else "sliding_attention"
                                          for i in range(layers)])
    if len(kinds) > 1:
        raise CheckpointError("layer_types: some layers have a sliding window and others not, which isn't supported; "
                              "model.sliding_window is one for all")
    return window if kinds == {"sliding_attention"} else None


def config(family: str, model: Any) -> dict[str, Any]:
    """config.json of a model that the family can express; `section` of it says whether it can."""
    activation = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}.get(model.activation, "silu")
    found = {
        "num_hidden_layers": model.num_layers, "hidden_size": model.hidden_size, "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups, "intermediate_size": model.ffn_hidden_size, "head_dim": model.head_dim,
        "max_position_embeddings": model.seq_length, "rms_norm_eps": model.norm_eps, "hidden_act": activation,
        **write_rope(model), "attention_dropout": model.attention_dropout,
    }  # fmt: skip
    if family == "llama":
        found |= {"attention_bias": model.bias, "mlp_bias": model.mlp_bias}
    if family == "qwen3":
        found |= {"attention_bias": model.bias}
    if family == "mistral":
        found |= {"sliding_window": model.sliding_window}
    if family in ("qwen2", "qwen3"):
        found |= {"use_sliding_window": model.sliding_window is not None, "sliding_window": model.sliding_window}
        found |= {"max_window_layers": 0 if model.sliding_window is not None else model.num_layers}
    return found


def layouts(model: Any) -> Iterator[Layout]:
    """Every tensor of the model."""
    yield Layout("model.embed_tokens.weight", ("embedding.word.weight",))
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield Layout(f"{theirs}.input_layernorm.weight", (f"{ours}.attention.norm.weight",))
        yield Layout(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.mlp.norm.weight",))
        for part, name in ATTENTION.items():
            yield Layout(f"{theirs}.self_attn.{name}.weight", (f"{ours}.attention.{part}.weight",))
            if model.bias if part == "projection" else model.qkv_bias:
                yield Layout(f"{theirs}.self_attn.{name}.bias", (f"{ours}.attention.{part}.bias",))
        for part, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")) if model.qk_norm else ():
            yield Layout(f"{theirs}.self_attn.{name}.weight", (f"{ours}.attention.{part}.weight",))
        for part, name in MLP.items():
            for suffix in ("weight", "bias") if model.mlp_bias else ("weight",):
                yield Layout(f"{theirs}.mlp.{name}.{suffix}", (f"{ours}.mlp.{part}.{suffix}",))
    yield Layout("model.norm.weight", ("final_norm.weight",))
    if not model.tie_embeddings:
        yield Layout("lm_head.weight", ("head.weight",))
