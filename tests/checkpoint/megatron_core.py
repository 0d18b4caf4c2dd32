"""For test_foreign.py, in a process that ends with it: Megatron Core's GPTModel on the CPU, its weights as Megatron-LM saves
them, and its logits."""
from __future__ import annotations

import argparse
import contextlib
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

SECTION = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 96, "seq_length": 32,
    "vocab_size": 256, "normalization": "layer_norm", "activation": "swiglu", "position_embedding": "rotary",
    "rotary_fraction": 0.5, "tie_embeddings": False, "bias": False, "qkv_bias": True, "mlp_bias": False,
}  # fmt: skip


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.cuda.current_device = lambda: "cpu"  # it asks for the current GPU without looking whether there is one
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.transformer_config import TransformerConfig

    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()  # GPUs' random states, for dropout
    parallel_state.initialize_model_parallel(1, 1)
    settings = TransformerConfig(
        num_layers=SECTION["num_layers"], hidden_size=SECTION["hidden_size"], num_attention_heads=SECTION["num_attention_heads"],
        num_query_groups=SECTION["num_query_groups"], ffn_hidden_size=SECTION["ffn_hidden_size"], use_cpu_initialization=True,
        add_bias_linear=False, add_qkv_bias=True, gated_linear_unit=True, activation_func=F.silu, hidden_dropout=0.0,
        attention_dropout=0.0, bias_activation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False)
    model = GPTModel(settings, get_gpt_layer_local_spec(), vocab_size=256, max_sequence_length=32, position_embedding_type="rope",
                     rotary_percent=0.5, share_embeddings_and_output_weights=False).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + centre)
        tokens = torch.randint(0, 256, (2, 32), generator=generator)
        future = torch.ones(1, 1, 32, 32).triu(1).bool()
        logits = model(tokens, torch.arange(32)[None].expand(2, -1), future)
    place = folder / "iter_0000001" / "mp_rank_00"
    place.mkdir(parents=True)
    arguments = argparse.Namespace(num_attention_heads=8, norm_epsilon=1e-5, rotary_base=10000, rotary_percent=0.5,
                                   attention_backend=parallel_state.RankGenerator)
    torch.save({"args": arguments, "checkpoint_version": 3.0, "model": model.state_dict()}, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    torch.save({"model": SECTION, "tokens": tokens, "logits": logits.float()}, folder / "answer.pt")
