"""transformers' small models with random weights, and their weights under megalm's canonical part names."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalm.checkpoint.huggingface import open_huggingface

HIDDEN, HEADS, LAYERS, FFN, SEQ = 64, 8, 3, 96, 32
VOCAB, PADDED = 250, 256
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, norms and biases too, so that a wrongly mapped or unused one shows in the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (centre if name.endswith("weight") else 0.0))
    return model.eval()


def llama_like(name: str, **changes: Any) -> nn.Module:
    import transformers

    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 4, "max_position_embeddings": SEQ, "rms_norm_eps": 1e-6,
        "rope_parameters": ROPE, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"vocab_size": VOCAB, "n_positions": SEQ, "n_embd": HIDDEN, "n_layer": LAYERS, "n_inner": FFN, "n_head": HEADS,
                "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**settings | changes))


def neox(**changes: Any) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS, "max_position_embeddings": SEQ, "bos_token_id": None,
                "eos_token_id": None}  # fmt: skip
    return GPTNeoXForCausalLM(GPTNeoXConfig(**settings | changes))


BUILD: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, activation_function="gelu"),
    "llama": lambda: llama_like("Llama"),
    "llama-linear": lambda: llama_like("Llama", rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}),
    "llama-llama3": lambda: llama_like("Llama", rope_parameters={**ROPE, **LLAMA3}, tie_word_embeddings=True),
    "llama-biases": lambda: llama_like("Llama", attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": lambda: llama_like("Mistral", sliding_window=9, head_dim=16),
    "qwen2": lambda: llama_like("Qwen2", rope_parameters={**ROPE, "rope_theta": 1e6}),
    "qwen2-window": lambda: llama_like("Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen3": lambda: llama_like("Qwen3", head_dim=24),
    "gpt_neox": lambda: neox(rope_parameters={**ROPE, "partial_rotary_factor": 0.25}),
    "gpt_neox-serial": lambda: neox(use_parallel_residual=False, hidden_act="gelu_new", attention_bias=False),
}


def build(name: str) -> nn.Module:
    """One of transformers' models with random weights."""
    return randomise(BUILD[name]())


def converted(name: str) -> tuple[nn.Module, dict, dict[str, Tensor]]:
    """(transformers' model, the megalm model section of the same model, its weights by part, as megalm reads its files)."""
    model = build(name)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        found = open_huggingface(folder)
        parts = {part: _padded(part, weight) for part, weight in found.weights.items()}
    return model, found.model.model_dump(mode="json"), parts


def save(model: nn.Module, folder: Path, **options: Any) -> None:
    """save_pretrained, without its progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)


def _padded(part: str, weight: Tensor) -> Tensor:
    """[vocabulary, h] -> [padded vocabulary, h]; the padding is large, so that it shows if it enters a softmax."""
    if part not in ("embedding.word.weight", "head.weight"):
        return weight
    return torch.cat((weight, torch.full((PADDED - VOCAB, weight.shape[1]), 3.0)))


MODELS = {name: lambda name=name: converted(name) for name in BUILD}


def tokens() -> Tensor:
    """int64 [2, 32] random tokens."""
    return torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(9))
