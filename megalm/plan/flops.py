"""Floating point operations of matrix products, a multiply-add counted as two; norms, activations and softmax are left out.

The same count as PaLM's (Chowdhery et al. 2022, appendix B) with causal attention counted as what it needs, half a square.
"""
from __future__ import annotations

from megalm.config import Config

from .backends import keeps_scores


def layer_forward(config: Config) -> float:
    """FLOPs of one transformer layer, forward, for each token."""
    model = config.model
    h, d, heads, groups = model.hidden_size, model.head_dim, model.num_attention_heads, model.num_query_groups
    attention = h * d * (heads + 2 * groups) + heads * d * h                                # query, key, value; projection
    mlp = (3 if model.gated else 2) * h * model.ffn_hidden_size                             # gate, up, down
    return 2.0 * (attention + mlp) + attention_core_forward(config)


def attention_core_forward(config: Config) -> float:
    """FLOPs of scores and context, forward, for each token: two products over the keys it sees, half of seq_length on average;
    of a sliding window the first queries see fewer than it holds."""
    model, s = config.model, config.model.seq_length
    window = min(model.sliding_window or s, s)
    return 2 * 2.0 * model.num_attention_heads * model.head_dim * (window * (window + 1) / 2 + (s - window) * window) / s


def head_forward(config: Config, padded_vocab_size: int) -> float:
    """FLOPs of the output projection, forward, for each token."""
    return 2.0 * config.model.hidden_size * padded_vocab_size


def per_token(config: Config, padded_vocab_size: int) -> float:
    """FLOPs the model needs for each token, forward and backward (twice forward): what MFU counts, recomputation left out."""
    return 3.0 * (config.model.num_layers * layer_forward(config) + head_forward(config, padded_vocab_size))


def per_token_executed(config: Config, padded_vocab_size: int, attention: str) -> float:
    """FLOPs done for each token: the model's and what recompute.mode does again, attention being this backend's."""
    again = 0.0
    if config.recompute.mode == "full":
        again = layer_forward(config)
    if config.recompute.mode == "selective" and keeps_scores(config, attention):
        again = attention_core_forward(config)
    return per_token(config, padded_vocab_size) + config.model.num_layers * again
