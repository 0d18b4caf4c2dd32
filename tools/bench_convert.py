"""The memory that `megalm convert` takes: a synthetic Llama is written, converted and converted back.

Each conversion runs in a process of its own, which imports everything, notes its peak, converts, and notes it again: what was
added, mapped pages of the files included, is printed beside the model's bytes and those of its largest tensor.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.huggingface.families import config_json
from megalm.checkpoint.huggingface.read import part_shapes
from megalm.checkpoint.huggingface.write import write_huggingface
from megalm.config.schema import Model
from megalm.tools import convert
from megalm.tools._command import Parser, positive, run


class Noise:
    """Weights of the right shapes, made a few rows at a time."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes

    def shape(self, part: str) -> tuple[int, ...]:
        return self.shapes[part]

    def dtype(self, part: str) -> torch.dtype:
        return torch.bfloat16

    def rows(self, part: str, low: int, high: int) -> Tensor:
        return torch.randint(-9, 9, (high - low, *self.shapes[part][1:]), dtype=torch.int8).to(torch.bfloat16)

    def release(self) -> None:
        """Nothing is held."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)


def peak_bytes() -> int:
    """The most memory that this process has had resident (Linux, VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def _measured(arguments: list[str], sender: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    before, started = peak_bytes(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = convert.main(arguments)
    sender.send((code, peak_bytes() - before, time.perf_counter() - started))


def measure(arguments: list[str]) -> tuple[int, float]:
    """(bytes added to the peak, seconds) of one conversion in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(arguments, sender))
    process.start()
    process.join()
    if process.exitcode or not receiver.poll():
        raise ValueError(f"the conversion ended with {process.exitcode}")
    code, added, seconds = receiver.recv()
    if code:
        raise ValueError(f"megalm convert {' '.join(arguments)} failed")
    return added, seconds


def _bench(arguments: argparse.Namespace) -> int:
    model = Model(num_layers=arguments.layers, hidden_size=arguments.hidden, num_attention_heads=arguments.hidden // 64,
                  seq_length=2048, vocab_size=arguments.vocab, normalization="rms_norm", activation="swiglu",
                  position_embedding="rotary", tie_embeddings=False, bias=False)
    shapes = part_shapes(model)
    sizes = [2 * torch.Size(shape).numel() for shape in shapes.values()]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        write_huggingface(root / "hf", "llama", model, Noise(shapes), config_json("llama", model, model.vocab_size))
        for way, source, target in (("hf to megalm", f"hf:{root / 'hf'}", str(root / "ours")),
                                    ("megalm to hf", str(root / "ours"), f"hf:{root / 'back'}")):
            added, seconds = measure(["--from", source, "--to", target])
            print(json.dumps({"way": way, "model_bytes": sum(sizes), "largest_bytes": max(sizes), "added_bytes": added,
                              "added_per_largest": round(added / max(sizes), 2), "seconds": round(seconds, 1)}), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0, or 2 with one line a mistake."""
    parser = Parser(prog="python -m megalm.tools.bench_convert", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--hidden", type=positive, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--layers", type=positive, default=24, metavar="N", help="default 24")
    parser.add_argument("--vocab", type=positive, default=65536, metavar="N", help="default 65536")
    parser.add_argument("--folder", help="where to put the files, which are deleted; default: the system's place for such")
    return run(parser, _bench, argv)


if __name__ == "__main__":
    raise SystemExit(main())
