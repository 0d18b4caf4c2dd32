"""GPT-2 (transformers' configuration_gpt2.py and modeling_gpt2.py): Conv1D keeps [in, out], q, k and v side by side in out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalm.checkpoint.foreign import Layout
from megalm.checkpoint.format import CheckpointError

ARCHITECTURE = "GPT2LMHeadModel"
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}
UNSUPPORTED = {"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}


def section(hf: Mapping[str, Any]) -> dict[str, Any]:
    """megalm's model section of a config.json. Raises CheckpointError for what isn't supported, KeyError for a missing key."""
    activation = hf.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"activation_function: {activation!r} isn't supported; {', '.join(ACTIVATIONS)} are")
    for key, only in UNSUPPORTED.items():
        if hf.get(key, only) != only:
            raise CheckpointError(f"{key}: {hf[key]} isn't supported")
    return {
        "num_layers": hf["n_layer"], "hidden_size": hf["n_embd"], "num_attention_heads": hf["n_head"],
        "ffn_hidden_size": hf.get("n_inner") or 4 * hf["n_embd"], "seq_length": hf.get("n_positions", 1024),
        "vocab_size": hf["vocab_size"], "normalization": "layer_norm", "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "activation": ACTIVATIONS[activation], "position_embedding": "learned",
        "tie_embeddings": bool(hf.get("tie_word_embeddings", True)), "bias": True, "dropout": float(hf.get("resid_pdrop", 0.1)),
        "attention_dropout": float(hf.get("attn_pdrop", 0.1)), "init_std": float(hf.get("initializer_range", 0.02)),
    }  # fmt: skip


def config(family: str, model: Any) -> dict[str, Any]:
    """config.json of a model that the family can express; `section` of it says whether it can."""
    return {
        "n_layer": model.num_layers, "n_embd": model.hidden_size, "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size, "n_positions": model.seq_length, "n_ctx": model.seq_length,
        "layer_norm_epsilon": model.norm_eps, "activation_function": "gelu" if model.activation == "gelu_exact" else "gelu_new",
        "resid_pdrop": model.dropout, "embd_pdrop": model.dropout, "attn_pdrop": model.attention_dropout,
    }  # fmt: skip


def layouts(model: Any) -> Iterator[Layout]:
    """Every tensor of the model."""
    yield Layout("transformer.wte.weight", ("embedding.word.weight",))
    yield Layout("transformer.wpe.weight", ("embedding.position.weight",))
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        for suffix in ("weight", "bias"):
            yield Layout(f"{theirs}.ln_1.{suffix}", (f"{ours}.attention.norm.{suffix}",))
            yield Layout(f"{theirs}.ln_2.{suffix}", (f"{ours}.mlp.norm.{suffix}",))
            qkv = tuple(f"{ours}.attention.{part}.{suffix}" for part in ("query", "key", "value"))
            yield Layout(f"{theirs}.attn.c_attn.{suffix}", qkv, transposed=True)
            for part, name in (("attention.projection", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                yield Layout(f"{theirs}.{name}.{suffix}", (f"{ours}.{part}.{suffix}",), transposed=True)
    for suffix in ("weight", "bias"):
        yield Layout(f"transformer.ln_f.{suffix}", (f"final_norm.{suffix}",))
    if not model.tie_embeddings:
        yield Layout("lm_head.weight", ("head.weight",))
