"""transformers' small models with random weights, and their weights under megalm's canonical part names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 96, "seq_length": 32}
VOCAB, PADDED = 250, 256


def _randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, norms and biases too, so that a wrongly mapped or unused one shows in the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (centre if name.endswith("weight") else 0.0))
    return model.eval()


def _padded(weight: Tensor) -> Tensor:
    """[vocabulary, h] -> [padded vocabulary, h]; the padding is large, so that it shows if it enters a softmax."""
    return torch.cat((weight, torch.full((PADDED - VOCAB, weight.shape[1]), 3.0)))


def gpt2() -> tuple[nn.Module, dict, dict[str, Tensor]]:
    """(GPT2LMHeadModel, the megalm model section of the same model, its weights by part)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    h, layers = SIZES["hidden_size"], SIZES["num_layers"]
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=SIZES["seq_length"], n_embd=h, n_layer=layers, n_inner=SIZES["ffn_hidden_size"],
        n_head=SIZES["num_attention_heads"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = _randomise(GPT2LMHeadModel(config))
    state = model.state_dict()
    parts = {
        "embedding.word.weight": _padded(state["transformer.wte.weight"]),
        "embedding.position.weight": state["transformer.wpe.weight"],
        "final_norm.weight": state["transformer.ln_f.weight"],
        "final_norm.bias": state["transformer.ln_f.bias"],
    }
    for i in range(layers):
        theirs, ours = f"transformer.h.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            parts[f"{ours}.attention.norm.{kind}"] = state[f"{theirs}.ln_1.{kind}"]
            parts[f"{ours}.mlp.norm.{kind}"] = state[f"{theirs}.ln_2.{kind}"]
            # Conv1D keeps [in, out]; q, k and v lie side by side in out.
            fused = state[f"{theirs}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, chunk in zip(("query", "key", "value"), fused, strict=True):
                parts[f"{ours}.attention.{name}.{kind}"] = chunk.t().contiguous()
            for name, conv in (("attention.projection", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                parts[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{conv}.{kind}"].t().contiguous()
    return model, SIZES | {"vocab_size": VOCAB, "num_query_groups": SIZES["num_attention_heads"]}, parts


_LLAMA_LIKE = {
    "normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary", "tie_embeddings": False,
    "bias": False, "norm_eps": 1e-6, "num_query_groups": 4, "vocab_size": VOCAB,
}  # fmt: skip


def _llama_like_parts(state: dict[str, Tensor], layers: int, qk_norm: bool) -> dict[str, Tensor]:
    parts = {
        "embedding.word.weight": _padded(state["model.embed_tokens.weight"]),
        "final_norm.weight": state["model.norm.weight"],
        "head.weight": _padded(state["lm_head.weight"]),
    }
    names = {
        "attention.norm": "input_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.projection": "self_attn.o_proj", "mlp.norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    if qk_norm:
        names |= {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
    for i in range(layers):
        for ours, theirs in names.items():
            parts[f"layers.{i}.{ours}.weight"] = state[f"model.layers.{i}.{theirs}.weight"]
    return parts


def _llama_like_arguments(scaling: dict | None) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling:
        rope |= {"rope_type": scaling["type"], **{k: v for k, v in scaling.items() if k not in ("type", "original_seq_length")}}
        if "original_seq_length" in scaling:
            rope["original_max_position_embeddings"] = scaling["original_seq_length"]
    return {
        "vocab_size": VOCAB, "hidden_size": SIZES["hidden_size"], "intermediate_size": SIZES["ffn_hidden_size"],
        "num_hidden_layers": SIZES["num_layers"], "num_attention_heads": SIZES["num_attention_heads"],
        "num_key_value_heads": _LLAMA_LIKE["num_query_groups"], "max_position_embeddings": SIZES["seq_length"],
        "rms_norm_eps": _LLAMA_LIKE["norm_eps"], "rope_parameters": rope, "tie_word_embeddings": False,
        "head_dim": SIZES["hidden_size"] // SIZES["num_attention_heads"], "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


def llama(scaling: dict | None = None) -> tuple[nn.Module, dict, dict[str, Tensor]]:
    """(LlamaForCausalLM, the megalm model section of the same model, its weights by part)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = _randomise(LlamaForCausalLM(LlamaConfig(**_llama_like_arguments(scaling))))
    section = SIZES | _LLAMA_LIKE | {"rotary_scaling": scaling}
    return model, section, _llama_like_parts(model.state_dict(), SIZES["num_layers"], qk_norm=False)


def qwen3() -> tuple[nn.Module, dict, dict[str, Tensor]]:
    """(Qwen3ForCausalLM: Llama with QK norm, the megalm model section of the same model, its weights by part)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    arguments = {k: v for k, v in _llama_like_arguments(None).items() if k != "mlp_bias"}
    model = _randomise(Qwen3ForCausalLM(Qwen3Config(**arguments)))
    section = SIZES | _LLAMA_LIKE | {"qk_norm": True}
    return model, section, _llama_like_parts(model.state_dict(), SIZES["num_layers"], qk_norm=True)


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-linear": lambda: llama({"type": "linear", "factor": 4.0}),
    "llama-llama3": lambda: llama(
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_seq_length": 16}
    ),
    "qwen3": qwen3,
}


def tokens() -> Tensor:
    """int64 [2, 32] random tokens."""
    return torch.randint(0, VOCAB, (2, SIZES["seq_length"]), generator=torch.Generator().manual_seed(9))
