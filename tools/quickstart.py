"""From raw text to generated text in a few minutes: what `make quickstart` runs, each step a command you could type yourself.

    python -m megalm.tools.quickstart [section.key=value ...]

Corpus -> SentencePiece model -> .bin/.idx -> training on 8 ranks -> evaluation -> a sample. What is already there is kept.
Where there aren't as many GPUs as ranks, the training runs on the CPU.
"""
from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megalm.config import Config, load
from megalm.metrics import draw_loss
from megalm.tools._command import Parser, run

CONFIG = "configs/quickstart.json"
FOLDER = Path("quickstart")
VOCABULARY = 4096
PROMPT = "def read_file(path):\n"
NEEDED_NATS = 0.5  # how far below the unigram entropy the loss must end: what only context can give


def step(title: str, command: Sequence[str], product: Path | None = None, save: Path | None = None,
         variables: Sequence[str] = ()) -> None:
    """Run one command in the terminal, unless its product exists; `save` keeps what it prints. ValueError when it fails.

    `variables` are NAME=value of its environment.
    """
    if product is not None and product.exists():
        print(f"\n== {title}: {product} is there already", flush=True)
        return
    program = ["megalm", *command[1:]] if command[0] == "megalm.cli" else ["python", "-m", *command]
    shown = shlex.join([*variables, *program])
    print(f"\n== {title}\n$ {shown}", flush=True)
    start = time.monotonic()
    code, output = call(["env", *variables, sys.executable, "-m", *command], capture=save is not None)
    if code:
        raise ValueError(f"{title} failed with exit code {code}; the command was: {shown}")
    if save is not None:
        print(output, end="", flush=True)
        save.write_text(output)
    print(f"   {time.monotonic() - start:.1f} s", flush=True)


def call(command: Sequence[str], capture: bool) -> tuple[int, str]:
    """(exit code, standard output if captured) of a command. After a Ctrl-C, which it gets too, it has time to save."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True)
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:
        while process.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
        raise
    return process.returncode, output or ""


def prepare() -> None:
    """Corpus, tokenizer and token files in FOLDER."""
    train, valid, model = FOLDER / "train.jsonl", FOLDER / "valid.jsonl", FOLDER / "spm.model"
    step("collect the Python standard library's source",
         ["megalm.tools.collect_corpus", "--output", str(train), "--valid", str(valid)], train)
    step("train a tokenizer", ["megalm.cli", "train-tokenizer", "--input", str(train), "--output", str(model),
                               "--vocab-size", str(VOCABULARY), "--max-bytes", "4000000"], model)
    for part in (train, valid):
        prefix = part.with_suffix("")
        step(f"tokenize {part}", ["megalm.cli", "preprocess", "--input", str(part), "--output", str(prefix),
                                  "--tokenizer", str(model), "--workers", "2"], prefix.with_suffix(".idx"))


def too_few_gpus(config: Config) -> bool:
    """True where not every rank of the config gets a GPU that torch can use."""
    import torch

    parallel = config.parallel
    return torch.cuda.device_count() < parallel.tp * parallel.pp * (1 if parallel.dp == "auto" else parallel.dp)


def unigram_entropy(config: Config) -> float:
    """Nats a token of the validation samples' labels: the loss of a model that knows every frequency and no context."""
    import numpy as np

    from megalm.data import build_dataset
    from megalm.train import data_seed

    dataset = build_dataset(config.data.valid, config.model.seq_length, config.train.eval_samples, data_seed(config), None)
    counts = np.bincount(np.concatenate([dataset.tokens(index)[1:] for index in range(dataset.num_samples)]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def last_evaluation(folder: Path) -> float:
    """The newest eval_loss of metrics.jsonl."""
    from megalm.metrics import read_metrics

    losses = [line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line]
    if not losses:
        raise ValueError(f"{folder}/metrics.jsonl has no evaluation; train.eval_every must not be 0")
    return losses[-1]


def quickstart(overrides: Sequence[str]) -> int:
    """The whole way; 1 when the model didn't learn context."""
    start = time.monotonic()
    prepare()
    config = load(CONFIG, overrides)
    step("train", ["megalm.cli", "train", CONFIG, *overrides],
         variables=["CUDA_VISIBLE_DEVICES="] if too_few_gpus(config) else [])
    folder = Path(config.train.dir)
    generate = ["megalm.cli", "generate", "--checkpoint", config.train.dir, "--prompt", PROMPT, "--max-new-tokens", "60",
                "--temperature", "0.8", "--top-p", "0.95", "--seed", "1"]
    step("generate", generate, save=folder / "samples.txt")
    entropy, loss = unigram_entropy(config), last_evaluation(folder)
    draw_loss(folder, unigram_entropy=entropy)
    print(f"\nunigram entropy of the validation tokens  {entropy:.3f} nats a token")
    print(f"validation loss of the model              {loss:.3f} nats a token, {entropy - loss:.3f} below")
    print(f"loss curve: {config.train.dir}/loss.png    everything else: {config.train.dir}/")
    print(f"quickstart took {time.monotonic() - start:.0f} s", flush=True)
    if entropy - loss < NEEDED_NATS:
        print(f"error: that is less than {NEEDED_NATS} nats: the model learned frequencies, not context", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when the loss is too high, 2 with one line on stderr when a step failed."""
    parser = Parser(prog="quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return run(parser, lambda arguments: quickstart(arguments.overrides), argv)


if __name__ == "__main__":
    sys.exit(main())
