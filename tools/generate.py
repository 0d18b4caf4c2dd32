"""Continue a prompt with the model of a checkpoint, whatever layout it was trained in. One process.

    megalm generate --checkpoint runs/quickstart --prompt "def main(" [--max-new-tokens 100 --temperature 0.8 --top-p 0.95]

The folder is a run's (its newest whole checkpoint is taken) or one checkpoint; config and tokenizer come from it.

The model sees a window of at most the seq_length tokens that it was trained on, the first of which has position 0. Of a longer
prompt it sees the last seq_length tokens; when a text outgrows the window, the older half of the window is forgotten. Keys and
values of what it sees are kept, so that each token is read once, and once more where the window moves on.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
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
from megalm.model.cache import KeyValueCache
from megalm.ops.decode import LEAST_PAGE
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import part_slices
from megalm.plan import Plan, make_plan
from megalm.tools._command import Parser, positive, run

ONE_DEVICE = (
    "parallel={}", "batch.micro=1", "batch.global=1", "recompute.mode=none", "kernels={}", "deepspeed={}", "train.compile=false",
    "train.attention_fp8=false",
)
"""What a layout asked for is of no concern to one process, nor are the kernels that another machine had."""
SMALL = 20_000_000
"""Parameters of a model whose products are too short to share among threads: on busy cores waiting for each takes longer."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0, or 2 with one line a mistake."""
    parser = Parser(prog="megalm generate", description=__doc__.partition("\n\n")[0],
                    epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder, or one checkpoint in it")
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT",
                        help="the text to go on from; empty: the start of a document. Several: all at once, a JSON object a line")
    parser.add_argument("--max-new-tokens", type=positive, default=100, metavar="N",
                        help="default 100; the end of the document ends it too")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1; 0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the drawing; the same seed, the same text. The second prompt draws with seed + 1, and so on")
    parser.add_argument("--page-size", type=_page_size, metavar="N",
                        help="keep keys and values in pages of N tokens (16, 32, 64, ...): of several prompts each then holds "
                             "what it needs, not as much as the longest, and gives it back at its end")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights (optimizer.ema_decay)")
    return run(parser, _generate, argv)


def _generate(arguments: argparse.Namespace) -> int:
    for text in arguments.prompt:
        if not _is_text(text):
            raise ValueError(f"--prompt {text!r} isn't valid UTF-8")
    choose = [Sampler(arguments.temperature, arguments.top_p, arguments.seed + index) for index in range(len(arguments.prompt))]
    folder = find(arguments.checkpoint, lambda line: print(line, file=sys.stderr))
    model = load_model(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.ema)
    window = model.config.model.seq_length
    if arguments.page_size is not None and arguments.page_size > max(LEAST_PAGE, window):
        raise ValueError(f"--page-size {arguments.page_size}: at most the model's window of {window} tokens expected")
    if model.device.type == "cpu" and sum(value.numel() for value in model.module.parameters()) < SMALL:
        torch.set_num_threads(1)
    prompts = [model.tokenizer.encode(text) for text in arguments.prompt]
    eod = model.tokenizer.eod
    if eod is None and not all(prompts):
        raise ValueError("the prompt is empty and the tokenizer has no token that starts a document")
    # A document follows the end of the one before: where there is no prompt, that is what stands before the first token.
    reading = Reading(model, [ids or [eod] for ids in prompts], arguments.page_size)
    new = continue_ids(reading, eod, arguments.max_new_tokens, choose)
    texts = [text + continuation(model.tokenizer, *ids) for text, *ids in zip(arguments.prompt, prompts, new, strict=True)]
    if len(texts) == 1:
        print(texts[0])
    else:
        for prompt, text in zip(arguments.prompt, texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
    return 0


def _page_size(text: str) -> int:
    size = positive(text)
    if size < LEAST_PAGE or size & (size - 1):
        raise argparse.ArgumentTypeError(f"{text} is not a power of two of at least {LEAST_PAGE}")
    return size


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
    def next_logits(self, rows: Sequence[Sequence[int]], cache: KeyValueCache | None = None) -> Tensor:
        """fp32 scores, on the CPU, of every token that may follow each of `rows`: [b, tokens]; padding isn't among them.

        rows: at most seq_length token ids each; with a cache, those after what was read into it, and they are read into it.
        """
        counts = [len(ids) for ids in rows]
        padded = torch.tensor([[*ids, *[0] * (max(counts) - len(ids))] for ids in rows], device=self.device)
        with contextlib.nullcontext() if cache is None else cache.adding(self.module, counts):
            hidden, weight = self.module.outputs(padded)             # [s, b, h], [V, h]
        last = hidden[[count - 1 for count in counts], range(len(rows))]
        tokens = min(self.plan.vocab_size, self.tokenizer.vocab_size)  # a model may have more rows than tokens have names
        return (last @ weight[:tokens].T).float().cpu()


class Reading:
    """Texts that a model reads as they grow, each token once.

    Of each the model sees a window of at most seq_length tokens, the first of which has position 0. When a text outgrows its
    window, the window becomes the newest half of seq_length, and is read again: once in seq_length / 2 tokens.
    page: of the cache's pages, in tokens; None: no pages.
    """

    def __init__(self, model: LoadedModel, texts: Sequence[Sequence[int]], page: int | None = None):
        self.model, self.most, self.page = model, model.config.model.seq_length, page
        self.windows = [list(ids[-self.most:]) for ids in texts]
        self._read_again()

    def _read_again(self) -> None:
        self.cache = KeyValueCache(len(self.windows), self.most, self.model.device, self.page)
        self.unread = self.windows

    def next_logits(self) -> Tensor:
        """Scores of every token that may follow each text: [b, tokens], fp32, on the CPU; once after each `add`."""
        logits, self.unread = self.model.next_logits(self.unread, self.cache), []
        return logits

    def add(self, tokens: Sequence[int]) -> None:
        """Each text goes on with its token; one that has ended stays as it is."""
        assert not self.unread, "what was added before has not been read"
        self.unread = [[token] if window else [] for window, token in zip(self.windows, tokens, strict=True)]
        for window, unread in zip(self.windows, self.unread, strict=True):
            window += unread
        if max(map(len, self.windows)) > self.most:
            self.windows = [window if len(window) <= self.most else window[-max(1, self.most // 2):] for window in self.windows]
            self._read_again()

    def end(self, text: int) -> None:
        """This text doesn't go on: its scores mean nothing from here on, and its pages are free. Without pages it is read on with
        the others, since texts of equal lengths cost less."""
        if self.page is not None:
            self.windows[text] = []
            self.cache.drop(text)


def load_model(folder: Path, device: torch.device, ema: bool = False) -> LoadedModel:
    """The model of one checkpoint, tp = pp = 1; `ema`: of the moving average of its weights.

    Raises CheckpointError, ConfigError or DataError.
    """
    config = load(folder / "config.json", overrides(device))
    section = config.tokenizer
    path = str(folder / TOKENIZER / Path(section.path).name) if section.path else None
    tokenizer = load_tokenizer(TokenizerSource(section.type, path, section.eod))
    plan = make_plan(config, 1, tokenizer.vocab_size)
    module = SequentialModel(layers(config, plan, TensorParallel(), StepContext(config.train.seed), device,
                                    initial=False), None)
    fill(module, read_weights(folder, ema))
    return LoadedModel(module.eval(), tokenizer, config, plan, device)


def overrides(device: torch.device) -> list[str]:
    """What one process on this device has otherwise than the run had it."""
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


def continue_ids(reading: Reading, eod: int | None, most: int, choose: Sequence[Callable[[Tensor], int]]) -> list[list[int]]:
    """At most `most` new token ids for each text; the token that ends a document ends them and isn't among them.

    choose: for each text, what draws a token from scores [tokens].
    """
    new: list[list[int]] = [[] for _ in choose]
    going = set(range(len(new)))
    tokens: list[int] = []
    for _ in range(most):
        if tokens:
            reading.add(tokens)
        tokens = [draw(scores) for draw, scores in zip(choose, reading.next_logits(), strict=True)]
        for text in [text for text in going if tokens[text] == eod]:
            going.remove(text)
            reading.end(text)
        for text in going:
            new[text].append(tokens[text])
        if not going:
            break
    return new


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that the new ids add. Decoded with the prompt, since some tokenizers drop a space at the start of a text."""
    before, after = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return after[len(before):] if after.startswith(before) else tokenizer.decode(new)


if __name__ == "__main__":
    raise SystemExit(main())
