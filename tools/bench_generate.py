"""Generated tokens a second, against the same model that reads the whole text for every token, and against transformers.

    python -m megalm.tools.bench_generate --out benchmarks/generate_cpu.json     # a few minutes
    python -m megalm.tools.bench_generate --lengths 128 --pairs 3

All continue the same prompts greedily with the same random weights, prompt included; that their tokens are the same is part of
the result. Ratios are of interleaved pairs with an interval, as bench_train's.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalm.config import validate
from megalm.data.tokenizer import TokenizerSource, load_tokenizer
from megalm.engine.sequential import SequentialModel
from megalm.model import layers
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import part_slices
from megalm.plan import make_plan
from megalm.tools._command import Parser, run
from megalm.tools.bench_peers import Size, Spec, megalm_config
from megalm.tools.bench_ranks import Turn
from megalm.tools.bench_train import interval, pair_ratios, race, versions
from megalm.tools.generate import LoadedModel, Reading, continue_ids

LENGTHS = (32, 128, 512, 1024, 1984)
SIZE = Size(seq=2048, vocab=257, batch=1)
KEYS = ("hidden", "layers", "heads", "ffn", "seq")
STD = 0.1  # of the weights: large enough that a rounding doesn't decide which token is the likeliest

Continue = Callable[[list[int], int], list[int]]
"""(prompt, number of new tokens) -> the likeliest ones."""


def build(size: Size) -> LoadedModel:
    """A Llama-style model with random weights, as `megalm generate` has one."""
    described = megalm_config(Spec("megalm"), size)
    described["model"]["init_std"] = STD
    config, tokenizer = validate(described), load_tokenizer(TokenizerSource("bytes", None, None))
    plan = make_plan(config, 1)
    module = SequentialModel(layers(config, plan, TensorParallel(), StepContext(1)), None).eval()
    return LoadedModel(module, tokenizer, config, plan, torch.device("cpu"))


def with_cache(model: LoadedModel) -> Continue:
    def run_on(prompt: list[int], new: int) -> list[int]:
        return continue_ids(Reading(model, [prompt]), None, new, [lambda scores: int(scores.argmax())])[0]

    return run_on


def recomputed(model: LoadedModel) -> Continue:
    def run_on(prompt: list[int], new: int) -> list[int]:
        known = list(prompt)
        for _ in range(new):
            known.append(int(model.next_logits([known]).argmax()))
        return known[len(prompt):]

    return run_on


def transformers(model: LoadedModel) -> Continue:
    """LlamaForCausalLM.generate with the same weights and its own cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    section = model.config.model
    rows = min(model.plan.vocab_size, model.tokenizer.vocab_size)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=rows, hidden_size=section.hidden_size, intermediate_size=section.ffn_hidden_size,
        num_hidden_layers=section.num_layers, num_attention_heads=section.num_attention_heads,
        max_position_embeddings=section.seq_length, rms_norm_eps=section.norm_eps, tie_word_embeddings=False,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )).eval()  # fmt: skip
    state = theirs.state_dict()
    with torch.no_grad():
        for name, values in parts(model).items():
            state[their_name(name)].copy_(values[:rows] if name in ("embedding.word.weight", "head.weight") else values)

    @torch.inference_mode()
    def run_on(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
        return found[0, len(prompt):].tolist()

    return run_on


def parts(model: LoadedModel) -> dict[str, Tensor]:
    """{canonical part name: values} of an unsharded model."""
    slices = (part_slices(parameter, parameter.detach()) for parameter in model.module.parameters())
    return {part.name: view for both in slices for part, view in both}


_THEIRS = {"attention.norm": "input_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
           "attention.value": "self_attn.v_proj", "attention.projection": "self_attn.o_proj",
           "mlp.norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
           "mlp.down": "mlp.down_proj"}
_OUTSIDE = {"embedding.word.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight"}


def their_name(part: str) -> str:
    """A part's name in transformers' Llama."""
    if part in _OUTSIDE:
        return _OUTSIDE[part]
    _, index, name = part.removesuffix(".weight").split(".", 2)
    return f"model.layers.{index}.{_THEIRS[name]}.weight"


@dataclass(frozen=True)
class Contender:
    """One way to continue a prompt, in this process; the interface of bench_ranks.Contender."""

    run_on: Continue
    prompt: tuple[int, ...]

    def turn(self, new: int) -> Turn:
        start, cpu = time.perf_counter(), time.process_time()
        self.run_on(list(self.prompt), new)
        return Turn(time.perf_counter() - start, time.process_time() - cpu, 0.0)


def measure(ours: Continue, peer: Continue, length: int, new: int, pairs: int) -> dict[str, Any]:
    """Ratio and speeds after a prompt of this length, and whether both found the same tokens."""
    prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    same = ours(prompt, new) == peer(prompt, new)
    turns = race(Contender(ours, tuple(prompt)), Contender(peer, tuple(prompt)), pairs, 0, new)
    median, low, high = interval(pair_ratios(turns))
    speed, peer_speed = (new / float(np.median([pair[side].seconds for pair in turns])) for side in (0, 1))
    return {"median": median, "low": low, "high": high, "pairs": pairs, "same_tokens": same, "tokens_per_second": round(speed, 1),
            "peer_tokens_per_second": round(peer_speed, 1)}


def one_token(model: LoadedModel, length: int, pairs: int) -> dict[str, float]:
    """A token behind `length` others: with them in the cache, and with all of them read again; prompts don't count."""
    reading, turns = Reading(model, [[5] * length]), []
    reading.next_logits()
    for _ in range(pairs):
        start = time.perf_counter()
        reading.add([7])
        reading.next_logits()
        between = time.perf_counter()
        model.next_logits(reading.windows)
        turns.append((Turn(between - start, 0.0, 0.0), Turn(time.perf_counter() - between, 0.0, 0.0)))
    median, low, high = interval(pair_ratios(turns))
    return {"median": median, "low": low, "high": high, "pairs": pairs,
            "seconds": float(np.median([ours.seconds for ours, _ in turns])),
            "seconds_recomputed": float(np.median([peer.seconds for _, peer in turns]))}


def bench(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Returns 0, or 1 where tokens differ or the cache didn't pay."""
    size, new = replace(SIZE, **{key: getattr(arguments, key) for key in KEYS}), arguments.new
    if min(arguments.pairs, new, *arguments.lengths) < 1 or max(arguments.lengths) + new > size.seq:
        raise ValueError(f"--pairs, --new and --lengths must be at least 1, and a length with {new} new tokens at most --seq "
                         f"{size.seq}")
    torch.set_num_threads(arguments.threads)
    model = build(size)
    ours, peers = with_cache(model), {"recomputed": recomputed(model), "transformers": transformers(model)}
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "threads": arguments.threads, "new": new,
                              "size": asdict(size), "parameters": parameters, "lengths": {}}
    good = True
    for length in arguments.lengths:
        found = {name: measure(ours, peer, length, new, arguments.pairs) for name, peer in peers.items()}
        token = one_token(model, length, min(arguments.pairs * 3, size.seq - length))
        report["lengths"][length] = {"one_token": token, **found}
        good &= all(one["same_tokens"] for one in found.values()) and token["median"] >= 1.0
        print(f"{length:6} tokens before: {token['seconds'] * 1e3:.2f} ms a token, {token['seconds_recomputed'] * 1e3:.2f} where "
              f"all are read again: {token['median']:.2f} [{token['low']:.2f}, {token['high']:.2f}]")
        for name, one in found.items():
            print(f"    against {name:13} {one['median']:7.2f} [{one['low']:.2f}, {one['high']:.2f}]  "
                  f"{one['tokens_per_second']:>8} tokens/s against {one['peer_tokens_per_second']:>8}"
                  f"{'' if one['same_tokens'] else '  OTHER TOKENS'}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if good else 1


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="bench_generate", description=__doc__.splitlines()[0])
    result.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="of the prompts, in tokens")
    result.add_argument("--new", type=int, default=32, help="tokens a turn")
    result.add_argument("--pairs", type=int, default=11)
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--out", type=Path, help="a JSON file for everything that was found")
    for key in KEYS:
        result.add_argument(f"--{key}", type=int, default=getattr(SIZE, key))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(parser(), bench, argv)


if __name__ == "__main__":
    sys.exit(main())
