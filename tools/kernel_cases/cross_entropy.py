"""Cross entropy: statistics and gradient of a share of the vocabulary, loss and gradient of the whole of it."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megalm.ops.cross_entropy import chunk_gradient, chunk_loss, chunk_statistics
from megalm.tools.kernel_cases.accuracy import randn
from megalm.tools.kernel_cases.case import Case

# (rows, width, padding columns): parts of a warp and of a batch, a column behind the packs, several batches, rows that no 16-byte
# access fits, more rows than multiprocessors and fewer.
SMALL = [(3, 37, 0), (5, 128, 28), (2, 1000, 1), (7, 5001, 130), (3, 8200, 5), (9, 16416, 17), (2, 35000, 3)]
LARGE = [(512, 32768, 0), (64, 131072, 100), (128, 128256, 0), (1000, 50257, 0), (3, 16384, 0)]
PLAIN, Z_LOSS, SMOOTHED, BOTH = ({"z_loss": z, "label_smoothing": eps} for z, eps in ((0, 0), (0.01, 0), (0, 0.1), (0.01, 0.1)))
FOREIGN = 3  # of the vocabulary lie in front of a share


def _tensors(rows: int, width: int, padding: int) -> list[Tensor]:
    """Logits [rows, width], targets in the share, beside it and ignored, and weights."""
    logits = 4 * randn(rows, width)
    logits[-1] = logits[-1].sort().values + 250  # the maximum is raised all along the row
    if padding:
        logits[:, -padding:] = torch.nan
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(FOREIGN, FOREIGN + width - padding, (rows,), generator=generator)
    targets[0], targets[1] = FOREIGN + width - padding - 1, -100  # the last column
    if rows > 4:
        targets[2], targets[3] = FOREIGN - 1, FOREIGN + width - padding  # before and behind the share
        targets[4] = FOREIGN  # the first column
    return [logits, targets, torch.rand(rows, generator=generator, dtype=torch.float64) * (targets >= 0)]


@torch.no_grad()
def _run(logits: Tensor, targets: Tensor, weight: Tensor, *, backend: str, what: str, padding: int, gap: int,
         extra: dict[str, float]):
    """gap: between rows, where nothing may be written."""
    space = logits.new_full((logits.shape[0], logits.shape[1] + gap), torch.nan)
    own = space[:, :logits.shape[1]]
    own.copy_(logits)
    vocab, weight = logits.shape[1] - padding, weight.double()
    smoothing = extra["label_smoothing"]
    if what == "statistics":
        # A target lies in front of the share by as much as its start says.
        return chunk_statistics(own, targets, FOREIGN, FOREIGN + vocab, label_smoothing=smoothing, backend=backend)
    if what == "loss":
        inside = torch.where(targets >= FOREIGN, targets - FOREIGN, -100)
        results: Sequence[Tensor] = (chunk_loss(own, inside, vocab, weight, **extra, backend=backend), own)
    else:
        # Of the rest of the vocabulary the log-sum-exp knows.
        logsumexp = torch.logsumexp(logits[:, :vocab].double(), dim=1) + 0.5
        results = (chunk_gradient(own, targets, FOREIGN, FOREIGN + vocab, logsumexp, weight, **extra, backend=backend),)
    assert bool(space[:, logits.shape[1]:].isnan().all()), "wrote beside its rows"
    return tuple(results)


def _cases(shapes: Sequence[tuple[int, int, int]], extras: dict[str, Sequence[dict[str, float]]], gap: int) -> list[Case]:
    cases = []
    for rows, width, padding in shapes:
        for what, settings in extras.items():
            for extra in settings:
                words = [f"{name}={value}" for name, value in extra.items() if value]
                name = " ".join([f"cross_entropy {what} {rows}x{width}", *([f"{padding} padding"] if padding else []), *words,
                                 *([f"gap {gap}"] if gap else [])])
                run = partial(_run, what=what, padding=padding, gap=gap, extra=extra)
                cases.append(Case(name, partial(_tensors, rows, width, padding), run))
    return cases


def small() -> list[Case]:
    extras = {"statistics": (PLAIN, SMOOTHED), "gradient": (PLAIN, BOTH), "loss": (PLAIN, Z_LOSS, SMOOTHED)}
    # A gap of 8 elements keeps rows aligned, one of 3 doesn't.
    both = dict.fromkeys(extras, (BOTH,))
    return _cases(SMALL, extras, 0) + _cases(SMALL[2:3], both, 8) + _cases(SMALL[2:3], both, 3)


def large() -> list[Case]:
    return _cases(LARGE, {"statistics": (PLAIN, SMOOTHED), "gradient": (PLAIN, BOTH), "loss": (PLAIN, BOTH)}, 0)
