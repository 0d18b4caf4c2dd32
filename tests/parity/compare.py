"""Holding one run against the reference: every function returns the list of what is wrong, empty when all is well.

Comparisons are written so that a NaN fails: `not (error <= bound)`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.parity.reference import Record, Weights

RELATIVE = 1e-5
BF16_FACTOR = 2.0


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + len) of the row-major flattening of full[dim: low..high] of a part."""

    part: str
    full_shape: tuple[int, ...]
    dim: int | None
    low: int
    high: int
    offset: int
    values: Tensor  # 1-D

    @property
    def place(self) -> tuple:
        return self.part, self.dim, self.low, self.high, self.offset, self.values.numel()


@dataclass
class RankResult:
    """What one rank hands back. Digests: what it holds and when -> place of a piece -> hash of its bytes."""

    rank_place: tuple[int, int, int] = (0, 0, 0)  # pp, dp, tp
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    first_gradients: list[Piece] = field(default_factory=list)
    last_gradients: list[Piece] = field(default_factory=list)
    parameters: list[Piece] = field(default_factory=list)
    digests: dict[str, dict[tuple, str]] = field(default_factory=dict)
    evaluation: tuple[float, int] | None = None


def assemble(pieces: Iterable[Piece]) -> tuple[Weights, list[str]]:
    """The full tensors that the pieces cover, by part, and what is missing."""
    full, covered = {}, {}
    for piece in pieces:
        if piece.part not in full:
            full[piece.part] = torch.full(piece.full_shape, math.nan, dtype=piece.values.dtype)
            covered[piece.part] = torch.zeros(piece.full_shape, dtype=torch.bool)
        for whole, values in ((full, piece.values), (covered, torch.ones(piece.values.shape, dtype=torch.bool))):
            slab = whole[piece.part]
            if piece.dim is not None:
                slab = slab.narrow(piece.dim, piece.low, piece.high - piece.low)
            flat = slab.reshape(-1)  # a copy where the slab isn't contiguous
            flat[piece.offset : piece.offset + values.numel()] = values
            slab.copy_(flat.view(slab.shape))
    return full, [f"{part}: {int((~hit).sum())} elements held by no rank" for part, hit in covered.items() if not hit.all()]


def gather(results: Sequence[RankResult]) -> tuple[Record, list[str]]:
    """All ranks' results as one Record, and where the ranks contradict each other."""
    first = results[0]
    problems = []
    for what in ("losses", "norms", "learning_rates", "evaluation"):
        if any(getattr(r, what) != getattr(first, what) for r in results):
            problems.append(f"{what} differ between ranks: {[getattr(r, what) for r in results]}")
    record = Record(list(first.losses), list(first.norms), evaluation=first.evaluation)
    for what in ("first_gradients", "last_gradients", "parameters"):
        full, missing = assemble(piece for r in results for piece in getattr(r, what))
        setattr(record, what, full)
        problems += [f"{what}: {text}" for text in missing]
    return record, problems


def replica_problems(results: Sequence[RankResult], expected: Mapping[str, Set[str] | None]) -> list[str]:
    """Where ranks that hold the same elements (tp and dp replicas, tied stages) don't hold the same bits.

    `expected`: first word of a digest's name -> the axes along which such ranks must have been found ("pp": tied stages), no
    more and no fewer; None: no rank may have such a digest.
    """
    seen: dict[tuple, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, result in enumerate(results):
        for what, places in result.digests.items():
            for place, digest in places.items():
                seen[(what, *place)][digest].append(rank)
    compared: dict[str, set[str]] = defaultdict(set)
    for (what, *_), digests in seen.items():
        places = [results[rank].rank_place for ranks in digests.values() for rank in ranks]
        compared[what] |= {axis for axis, held in zip(("pp", "dp", "tp"), zip(*places, strict=True), strict=True)
                           if len(set(held)) > 1}
    problems = []
    for word, axes in expected.items():
        found = [axes_of for what, axes_of in compared.items() if what.split()[0] == word]
        if (axes is None) != (found == []) or any(axes_of != axes for axes_of in found):
            problems.append(f"replicas compared of {word}: along {found}, expected: {axes}")
    return problems + [f"replicas of {key} differ: ranks {sorted(d.values())}" for key, d in seen.items() if len(d) > 1]


# ---- fp32 ------------------------------------------------------------------------------------------------------------


def scalar_problems(what: str, ours: Sequence[float], theirs: Sequence[float], bound: float = RELATIVE) -> list[str]:
    """A series of numbers, one a step, within a relative bound."""
    if len(ours) != len(theirs):
        return [f"{what}: {len(ours)} steps, not {len(theirs)}"]
    return [
        f"{what} at step {step}: {a!r}, reference {b!r}"
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if not abs(a - b) <= bound * abs(b)
    ]


def global_norm(tensors: Weights) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values()))


def tensor_problems(what: str, ours: Weights, theirs: Weights, bound: float = RELATIVE) -> list[str]:
    """max|difference| <= bound (max|t| + 0.01 of the global norm), for each part.

    The share of the global norm is for parts whose value is zero in exact arithmetic (the gradient of GPT-2's key bias).
    """
    problems = [f"{what}: {sorted(set(ours) ^ set(theirs))} on one side only"] if set(ours) != set(theirs) else []
    floor = 0.01 * global_norm(theirs)
    for part in sorted(set(ours) & set(theirs)):
        a, b = ours[part].double(), theirs[part].double()
        error, allowed = (a - b).abs().max().item(), bound * (b.abs().max().item() + floor)
        if not (error <= allowed and torch.isfinite(a).all()):
            problems.append(f"{what} of {part}: off by {error:.2e}, at most {allowed:.2e}")
    return problems


def evaluation_problems(ours: tuple[float, int] | None, theirs: tuple[float, int] | None) -> list[str]:
    if ours is None or theirs is None or ours[1] != theirs[1]:
        return [f"evaluation: {ours}, reference {theirs}"]
    return scalar_problems("evaluation loss", [ours[0]], [theirs[0]])


def fp32_problems(ours: Record, theirs: Record) -> list[str]:
    """Everything that fp32 parity asks for."""
    return [
        *scalar_problems("loss", ours.losses, theirs.losses),
        *scalar_problems("gradient norm", ours.norms, theirs.norms),
        *tensor_problems("first gradient", ours.first_gradients, theirs.first_gradients),
        *tensor_problems("last gradient", ours.last_gradients, theirs.last_gradients),
        *tensor_problems("parameter", ours.parameters, theirs.parameters),
        *evaluation_problems(ours.evaluation, theirs.evaluation),
    ]


# ---- bf16 ------------------------------------------------------------------------------------------------------------


def _worst_step(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference over the steps; NaN wherever one is."""
    errors = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def _distance(a: Weights, b: Weights) -> float:
    """Euclidean distance of all parts together."""
    assert set(a) == set(b), set(a) ^ set(b)
    return global_norm({part: a[part].double() - b[part].double() for part in b})


def bf16_problems(ours: Record, serial: Sequence[Record], exact: Record) -> list[str]:
    """Error against serial fp32 at most twice that of serial bf16: losses, norms, gradients (each part too), parameters.

    The error of one bf16 run is partly luck, a single number's (a norm's) most of all: serial bf16 is several runs that
    differ in their micro-batches only, and its error the largest of theirs.
    """
    problems = []

    def check(what: str, distance: Callable[[Record], float], floor: float = 0.0) -> None:
        error, yardstick = distance(ours), max(distance(record) for record in serial) + floor
        if not error <= BF16_FACTOR * yardstick:
            problems.append(f"{what}: error {error:.2e} against fp32, serial bf16 has {yardstick:.2e}")

    for what in ("losses", "norms"):
        check(what, lambda record, what=what: _worst_step(getattr(record, what), getattr(exact, what)))
    for what in ("first_gradients", "last_gradients", "parameters"):
        check(what, lambda record, what=what: _distance(getattr(record, what), getattr(exact, what)))
    floor = 1e-3 * global_norm(exact.first_gradients)
    for part in exact.first_gradients:
        check(f"first gradient of {part}", lambda record, part=part: _distance(
            {part: record.first_gradients[part]}, {part: exact.first_gradients[part]}), floor)  # fmt: skip
    return problems
