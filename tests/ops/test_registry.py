"""How a backend is chosen: by name, by the measured table, around what it can't do; and that a choice costs little."""

from __future__ import annotations

import json
import logging
from importlib import resources

import pytest
import torch

from megalm.ops import activation, attention, cross_entropy, decode, dropout, norm, rotary, softmax
from megalm.ops.registry import REGISTRY, Features, Registry, choose

MODULES = {"attention": attention, "softmax": softmax, "norm": norm, "rotary": rotary, "activation": activation,
           "dropout": dropout, "cross_entropy": cross_entropy, "decode": decode}
CPU = Features("cpu", torch.float32)


def registry(**measured) -> Registry:
    table = {
        "norm": ["torch", "reference"],
        "measured": measured,
        "backends": {"norm": {
            "torch": {},
            "reference": {},
            "megalm": {"cannot": {"cpu": "it needs a GPU", "float64": "it has no float64"}},
            "library": {"avoid": {"dropout": "its mask isn't keyed"}},
        }},
    }
    made = Registry(table)
    made.register("norm", **{name: name.upper for name in ("torch", "reference", "megalm", "library")})
    return made


def name(found) -> str:
    return found[0]().lower()


def test_auto_takes_the_order_of_the_measured_device_first():
    assert name(registry().choose("norm", "auto", CPU)) == "torch"
    assert name(registry(cpu={"norm": ["reference", "torch"]}).choose("norm", "auto", CPU)) == "reference"
    assert name(registry(cuda={"norm": ["reference", "torch"]}).choose("norm", "auto", CPU)) == "torch"


def test_a_gpu_measured_by_name_goes_before_gpus_in_general(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    cuda = Features("cuda", torch.float32)
    measured = {"cuda": {"norm": ["torch"]}, "NVIDIA H200": {"norm": ["reference"]}}
    assert name(registry(**measured).choose("norm", "auto", cuda)) == "reference"
    assert name(registry(cuda={"norm": ["torch"]}).choose("norm", "auto", cuda)) == "torch"


def test_auto_passes_over_what_cannot_serve_or_is_avoided_and_says_why():
    measured = {"cpu": {"norm": ["absent", "megalm", "library", "torch"]}, "cuda": {"norm": ["megalm", "torch"]}}
    made = registry(**measured)
    found = made.choose("norm", "auto", CPU._replace(traits=("dropout",)))
    assert name(found) == "torch"
    assert found[1] == "the fastest that serves on cpu; not megalm: it needs a GPU; not library: its mask isn't keyed"
    assert name(made.choose("norm", "auto", CPU)) == "library"
    assert name(made.choose("norm", "auto", Features("cuda", torch.bfloat16))) == "megalm"
    assert name(made.choose("norm", "auto", Features("cuda", torch.float64))) == "torch"


def test_what_all_avoid_is_served_by_the_first_that_can(monkeypatch):
    made = registry(cpu={"norm": ["megalm", "library", "torch"]})
    for backend in ("megalm", "torch"):
        monkeypatch.setitem(made.table["backends"]["norm"][backend], "avoid", {"dropout": "it is slow"})
    made.register("norm", megalm="megalm".upper, torch="torch".upper)
    found = made.choose("norm", "auto", CPU._replace(traits=("dropout",)))
    assert name(found) == "library" and found[1] == "the fastest that serves on cpu; not megalm: it needs a GPU"
    reasons = [reason for _, reason in made.candidates("norm", CPU._replace(traits=("dropout",)))]
    assert reasons == ["it needs a GPU", None, "it is slow"]


def test_a_named_backend_serves_or_is_an_error():
    made = registry()
    assert name(made.choose("norm", "library", CPU._replace(traits=("dropout",)))) == "library"
    with pytest.raises(ValueError, match="kernels.norm is 'megalm', which can't serve cpu float32: it needs a GPU"):
        made.choose("norm", "megalm", CPU)
    with pytest.raises(ValueError, match="kernels.norm is 'tourch'; it can be auto, torch, reference, megalm, library"):
        made.choose("norm", "tourch", CPU)


def test_no_backend_at_all_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match=r"no backend serves cpu float32 \(not megalm: it needs a GPU\)"):
        registry(cpu={"norm": ["megalm"]}).choose("norm", "auto", CPU)


def test_a_choice_is_made_and_logged_once(caplog):
    made = registry()
    with caplog.at_level(logging.INFO, logger="megalm.ops.registry"):
        first, second = made.choose("norm", "auto", CPU), made.choose("norm", "auto", CPU)
    assert first is second
    assert [record.getMessage() for record in caplog.records] == ["norm on cpu float32: torch (the fastest that serves on cpu)"]


@pytest.mark.parametrize("op", MODULES)
def test_the_shipped_table_names_what_the_files_register(op):
    table = json.loads((resources.files("megalm.ops") / "backends.json").read_text(encoding="utf-8"))
    registered = set(REGISTRY.backends[op])
    assert registered == set(table["backends"][op]) == set(table[op])
    for device, orders in table["measured"].items():
        assert set(orders) <= {*MODULES, "optimizer"} and set(orders[op]) <= registered, device
    assert choose(op, "reference", CPU)[1] == "named in the configuration"


def test_attention_dropout_takes_the_reference_with_the_reason():
    run, reason = choose("attention", "auto", CPU._replace(traits=("dropout",)))
    assert run is REGISTRY.backends["attention"]["reference"].run
    assert "not torch: a library's own dropout mask depends on the layout" in reason
