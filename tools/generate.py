"""Continue a prompt with the model of a checkpoint, whatever layout it was trained in. One process.

    megalm generate --checkpoint runs/quickstart --prompt "def main(" [--max-new-tokens 100 --temperature 0.8 --top-p 0.95]

The folder is a run's (its newest whole checkpoint is taken) or one checkpoint; config and tokenizer come from it.
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megalm.checkpoint import CheckpointError, Weights, find, read_weights
from megalm.checkpoint.format import TOKENIZER
from megalm.config import Config, load
from megalm.data.tokenizer import Tokenizer, TokenizerSource, load_tokenizer
from megalm.engine.sequential import SequentialModel
from megalm.model import layers
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import part_slices
from megalm.plan import Plan, make_plan
from megalm.tools._command import Parser, positive, run

ONE_DEVICE = (
    "parallel={}", "batch.micro=1", "batch.global=1", "recompute.mode=none", "kernels={}", "deepspeed={}", "train.compile=false",
)
"""What a layout asked for is of no concern to one process, nor are the kernels that another machine had."""
SMALL = 20_000_000
"""Parameters of a model whose products are too short to share among threads: on busy cores waiting for each takes longer."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0, or 2 with one line a mistake."""
    parser = Parser(prog="megalm generate", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder, or one checkpoint in it")
    parser.add_argument("--prompt", required=True, help="the text to go on from; empty: the start of a document")
    parser.add_argument("--max-new-tokens", type=positive, default=100, metavar="N",
                        help="default 100; the end of the document ends it too")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1; 0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing; the same seed, the same text")
    return run(parser, _generate, argv)


def _generate(arguments: argparse.Namespace) -> int:
    if not _is_text(arguments.prompt):
        raise ValueError(f"--prompt {arguments.prompt!r} isn't valid UTF-8")
    choose = Sampler(arguments.temperature, arguments.top_p, arguments.seed)
    folder = find(arguments.checkpoint, lambda line: print(line, file=sys.stderr))
    model = load_model(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if model.device.type == "cpu" and sum(value.numel() for value in model.module.parameters()) < SMALL:
        torch.set_num_threads(1)
    prompt = model.tokenizer.encode(arguments.prompt)
    if not prompt and model.tokenizer.eod is None:
        raise ValueError("the prompt is empty and the tokenizer has no token that starts a document")
    # A document follows the end of the one before: where there is no prompt, that is what stands before the first token.
    ids = continue_ids(model, prompt or [model.tokenizer.eod], arguments.max_new_tokens, choose)
    print(arguments.prompt + continuation(model.tokenizer, prompt, ids))
    return 0


def _is_text(prompt: str) -> bool:
    """False for bytes of the command line that are no text: Python passes them on as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model on one device, and what it takes to use it."""

    module: SequentialModel
    tokenizer: Tokenizer
    config: Config
    plan: Plan
    device: torch.device

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """fp32 scores, on the CPU, of every token that may follow `ids`: [tokens]; columns of padding aren't among them."""
        window = ids[-self.config.model.seq_length:]
        hidden, weight = self.module.outputs(torch.tensor([window], device=self.device))  # [s, 1, h], [V, h]
        tokens = min(self.plan.vocab_size, self.tokenizer.vocab_size)  # a model may have more rows than tokens have names
        return (hidden[-1, 0] @ weight[:tokens].T).float().cpu()


def load_model(folder: Path, device: torch.device) -> LoadedModel:
    """The model of one checkpoint, tp = pp = 1. Raises CheckpointError, ConfigError or DataError."""
    config = load(folder / "config.json", _overrides(folder, device))
    section = config.tokenizer
    path = str(folder / TOKENIZER / Path(section.path).name) if section.path else None
    tokenizer = load_tokenizer(TokenizerSource(section.type, path, section.eod))
    plan = make_plan(config, 1, tokenizer.vocab_size)
    module = SequentialModel(layers(config, plan, TensorParallel(), StepContext(config.train.seed), device,
                                    initial=False), None)
    fill(module, read_weights(folder))
    return LoadedModel(module.eval(), tokenizer, config, plan, device)


def _overrides(folder: Path, device: torch.device) -> list[str]:
    # A CPU is as fast in fp32, which is what the masters are.
    return [*ONE_DEVICE, "precision.dtype=fp32"] if device.type == "cpu" else list(ONE_DEVICE)


@torch.no_grad()
def fill(module: nn.Module, weights: Weights) -> None:
    """Copy the checkpoint's weights into an unsharded model, one part at a time. Raises CheckpointError naming the part."""
    for parameter in module.parameters():
        for part, view in part_slices(parameter, parameter.detach()):
            if part.name not in weights:
                raise CheckpointError(f"{part.name} isn't in the checkpoint")
            if weights.shape(part.name) != part.full_shape:
                shapes = f"{list(weights.shape(part.name))} in the checkpoint, {list(part.full_shape)} here"
                raise CheckpointError(f"{part.name} is {shapes}")
            view.copy_(weights[part.name])


class Sampler:
    """Draws a token from its scores.

    temperature 0: the likeliest. Else from softmax(logits / temperature), of which `top_p` < 1 keeps the likeliest tokens up
    to the first that makes their sum reach it (nucleus sampling, Holtzman et al. 2020).
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0):
        """Raises ValueError for a negative temperature or a top_p outside (0, 1]."""
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"--temperature {temperature}: a number of at least 0 expected")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"--top-p {top_p}: a number above 0 and at most 1 expected")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """One of the indices of `logits` [tokens]."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        # The greatest score is subtracted first, so that a tiny temperature doesn't overflow.
        likely, order = ((logits.double() - logits.max()) / self.temperature).softmax(dim=0).sort(descending=True)
        before = likely.cumsum(dim=0) - likely  # the probability of all likelier tokens
        likely = likely.masked_fill(before >= self.top_p, 0.0)
        return int(order[torch.multinomial(likely, 1, generator=self.generator)])


def continue_ids(model: LoadedModel, ids: Sequence[int], most: int, choose: Callable[[Tensor], int]) -> list[int]:
    """At most `most` new token ids after `ids`; the token that ends a document ends them and isn't among them."""
    known = list(ids)
    for _ in range(most):
        token = choose(model.next_logits(known))
        if token == model.tokenizer.eod:
            break
        known.append(token)
    return known[len(ids):]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that the new ids add. Decoded with the prompt, since some tokenizers drop a space at the start of a text."""
    before, after = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return after[len(before):] if after.startswith(before) else tokenizer.decode(new)


if __name__ == "__main__":
    raise SystemExit(main())
