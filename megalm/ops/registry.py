"""Which implementation of an operation runs: chosen once for each (operation, name, features), then a dictionary look-up.

An operation's file registers its backends; what each can serve and in which order `auto` tries them is data, in
backends.json. What only the machine can tell (a library that is built or installed) is a function given at registration.
A backend named in the configuration that can't serve is an error; `auto` takes the fastest that can.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

import torch

_log = logging.getLogger(__name__)


class Features(NamedTuple):
    """What a call needs of a backend: its device type, dtype, and traits such as "dropout"."""

    device: str
    dtype: torch.dtype
    traits: tuple[str, ...] = ()

    def words(self) -> tuple[str, ...]:
        return (self.device, str(self.dtype).removeprefix("torch."), *self.traits)


Missing = Callable[[Features], str | None]


@dataclass(frozen=True)
class Backend:
    """One implementation. `cannot`, `by_name` and `avoid` map a trait to the reason why it is not served, never taken by `auto`,
    or taken by `auto` only where every other one can't serve either.

    `run` is what the operation's file calls: a function, or a tuple of functions where the file has several. `missing` tells
    what this machine lacks for a call with such features, None if nothing.
    """

    name: str
    run: Callable | tuple[Callable, ...]
    missing: Missing = lambda features: None
    cannot: Mapping[str, str] = field(default_factory=dict)
    by_name: Mapping[str, str] = field(default_factory=dict)
    avoid: Mapping[str, str] = field(default_factory=dict)

    def supports(self, features: Features) -> str | None:
        """None, or the reason why this backend can't serve such a call."""
        return _first_reason(self.cannot, features) or self.missing(features)

    def open_to_auto(self, features: Features) -> str | None:
        """None, or the reason why `auto` must not take it."""
        return self.supports(features) or _first_reason(self.by_name, features)


def _first_reason(reasons: Mapping[str, str], features: Features) -> str | None:
    return next((reasons[word] for word in features.words() if word in reasons), None)


class Registry:
    """The backends of all operations and the choices made so far.

    Args:
        table: the content of backends.json.
    """

    def __init__(self, table: Mapping[str, Any]):
        self.table = table
        self.backends: dict[str, dict[str, Backend]] = {}
        self.chosen: dict[tuple[str, str, Features], tuple[Any, str]] = {}

    def register(self, op: str, needs: Mapping[str, Missing] | None = None, **runs: Callable | tuple[Callable, ...]) -> None:
        """Add backends of an operation, each by name; their capabilities come from the table, `needs` tells what is missing."""
        declared, needs = self.table["backends"].get(op, {}), needs or {}
        for name, run in runs.items():
            capability = declared.get(name, {})
            missing = needs.get(name, lambda features: None)
            backend = Backend(name, run, missing, *(capability.get(kind, {}) for kind in ("cannot", "by_name", "avoid")))
            self.backends.setdefault(op, {})[name] = backend

    def choose(self, op: str, name: str, features: Features) -> tuple[Any, str]:
        """(implementation, reason) for a call of `op`. Raises ValueError for an unknown name or one that can't serve."""
        found = self.chosen.get((op, name, features))
        if found is None:
            backend, reason = self._choose(op, name, features)
            _log.info("%s on %s: %s (%s)", op, " ".join(features.words()), backend.name, reason)
            found = self.chosen[(op, name, features)] = (backend.run, reason)
        return found

    def order(self, op: str, device: str) -> list[str]:
        """Names that `auto` tries on this device type, fastest first."""
        kind = self.measured_on(op, device)
        return self.table[op] if kind is None else self.table["measured"][kind][op]

    def measured_on(self, op: str, device: str) -> str | None:
        """Whose measured order `auto` takes on this device type: the GPU's by its name, or the type's; None: nobody's."""
        measured = self.table.get("measured", {})
        kind = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device
        return next((key for key in (kind, device) if op in measured.get(key, {})), None)

    def candidates(self, op: str, features: Features) -> Iterator[tuple[Backend, str | None]]:
        """Backends in the order in which `auto` tries them, each with the reason why it is passed over; None: it may be taken.

        Where every one that serves is avoided, the first of them is taken all the same.
        """
        known = [self.backends[op][name] for name in self.order(op, features.device) if name in self.backends[op]]
        reasons = [backend.open_to_auto(features) or _first_reason(backend.avoid, features) for backend in known]
        spare = None if None in reasons else next((backend for backend in known if backend.open_to_auto(features) is None), None)
        yield from ((backend, None if backend is spare else reason) for backend, reason in zip(known, reasons, strict=True))

    def _choose(self, op: str, name: str, features: Features) -> tuple[Backend, str]:
        backends = self.backends[op]
        if name != "auto":
            if name not in backends:
                raise ValueError(f"kernels.{op} is {name!r}; it can be auto, {', '.join(backends)}")
            reason = backends[name].supports(features)
            if reason is not None:
                raise ValueError(f"kernels.{op} is {name!r}, which can't serve {' '.join(features.words())}: {reason}")
            return backends[name], "named in the configuration"
        passed = []
        for backend, reason in self.candidates(op, features):
            if reason is None:
                return backend, "; ".join([f"the fastest that serves on {features.device}", *passed])
            passed.append(f"not {backend.name}: {reason}")
        tried = [backend.name for backend, _ in self.candidates(op, features)]
        others = {name: backends[name].supports(features) for name in backends if name not in tried}  # not for this device
        passed = [*(f"not {name}: {reason}" for name, reason in others.items() if reason), *passed]
        raise ValueError(f"kernels.{op}: no backend serves {' '.join(features.words())} ({'; '.join(passed)})")


REGISTRY = Registry(json.loads((resources.files(__package__) / "backends.json").read_text(encoding="utf-8")))
register = REGISTRY.register


def choose(op: str, name: str, features: Features) -> tuple[Any, str]:
    """(implementation, reason) for a call of `op` under the configured name. Raises ValueError where it can't be served."""
    if torch.compiler.is_compiling():
        # Settled while tracing: the compiled code holds the chosen implementation, neither the choice nor its log line.
        chosen, reason = _choice_while_tracing(op, name, features.device, features.dtype, features.traits)
        return REGISTRY.backends[op][chosen].run, reason
    return REGISTRY.choose(op, name, features)


def choose_name(op: str, name: str, features: Features) -> tuple[str, str]:
    """(name of the chosen backend, reason). Raises as `choose`."""
    run, reason = REGISTRY.choose(op, name, features)
    return next(backend.name for backend in REGISTRY.backends[op].values() if backend.run is run), reason


@torch.compiler.assume_constant_result
def _choice_while_tracing(op: str, name: str, device: str, dtype: torch.dtype, traits: tuple[str, ...]) -> tuple[str, str]:
    return choose_name(op, name, Features(device, dtype, traits))
