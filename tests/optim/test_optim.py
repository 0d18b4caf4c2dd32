"""Groups, learning rates, implementations."""
from __future__ import annotations

import copy
import logging
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

from megalm.config.schema import Optimizer
from megalm.ops.registry import REGISTRY
from megalm.optim import build_optimizer, lr_at, optimizer, param_groups


def section(**more) -> SimpleNamespace:
    adam = {"name": "adamw", "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return SimpleNamespace(**{**adam, "momentum": 0.9, "impl": "auto", **more})


def schedule(decay="cosine", warmup_steps=0, min_lr=0.0, decay_steps=None) -> SimpleNamespace:
    return SimpleNamespace(decay=decay, warmup_steps=warmup_steps, min_lr=min_lr, decay_steps=decay_steps)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5))


def test_matrices_decay_and_vectors_don_t():
    net = model()
    decay, plain = param_groups(net.named_parameters(), 0.1)
    assert (decay["name"], decay["weight_decay"], plain["name"], plain["weight_decay"]) == ("decay", 0.1, "no_decay", 0.0)
    assert [id(p) for p in decay["params"]] == [id(net[0].weight), id(net[1].weight)]
    assert [id(p) for p in plain["params"]] == [id(net[1].bias), id(net[2].weight), id(net[2].bias)]


def test_empty_groups_stay_tied_parameters_count_once_and_frozen_ones_not():
    linear = nn.Linear(3, 3, bias=False)
    frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    groups = param_groups([("a", linear.weight), ("tied", linear.weight), ("frozen", frozen)], 0.1)
    assert [(group["name"], len(group["params"])) for group in groups] == [("decay", 1), ("no_decay", 0)]
    linear(torch.ones(3)).sum().backward()
    build_optimizer(section(), [("a", linear.weight)]).step()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizers_do_what_their_formulas_say(name):
    """Three steps in float64 arithmetic by hand."""
    config = section(name=name, lr=0.03, weight_decay=0.2, eps=1e-6)
    weight, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    expected = [weight.detach().double(), bias.detach().double()]
    optimizer = build_optimizer(config, [("weight", weight), ("bias", bias)])
    first, second = [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 4):
        gradients = [torch.randn_like(p) for p in (weight, bias)]
        weight.grad, bias.grad = gradients[0].clone(), gradients[1].clone()
        optimizer.step()
        for index, decay in enumerate((0.2, 0.0)):
            g = gradients[index].double()
            if name == "sgd":
                first[index] = 0.9 * first[index] + g + decay * expected[index]
                expected[index] = expected[index] - 0.03 * first[index]
                continue
            first[index] = 0.9 * first[index] + 0.1 * g
            second[index] = 0.95 * second[index] + 0.05 * g * g
            m, v = first[index] / (1 - 0.9**step), second[index] / (1 - 0.95**step)
            expected[index] = expected[index] * (1 - 0.03 * decay) - 0.03 * m / (v.sqrt() + 1e-6)
    for actual, wanted in zip((weight, bias), expected, strict=True):
        torch.testing.assert_close(actual.detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_torch_is_fused_where_it_can_be():
    assert all(group["fused"] for group in build_optimizer(section(), model().named_parameters()).param_groups)
    meta = build_optimizer(section(impl="torch"), model().to("meta").named_parameters())
    assert isinstance(meta, torch.optim.AdamW) and not any(group["fused"] for group in meta.param_groups)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the parameters were there."""
    monkeypatch.setattr(optimizer, "device_type", lambda groups: "cuda")


@pytest.mark.parametrize("impl, reason", [("apex", "apex"), ("deepspeed", "isn't offered here; available: auto, torch, apex")])
def test_an_implementation_that_isn_t_here_is_the_user_s_error(impl, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(ValueError, match=f"optimizer.impl '{impl}'.*{reason}") as caught:
        build_optimizer(section(impl=impl), model().named_parameters())
    assert "\n" not in str(caught.value)


def test_an_implementation_that_was_installed_but_not_built(monkeypatch, on_gpu):
    """Apex raises RuntimeError from its constructor when its extension is missing."""
    def unbuilt(*_, **__):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions\nsecond line")

    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    fake = ModuleType("apex.optimizers")
    fake.FusedAdam = unbuilt
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake)
    with pytest.raises(ValueError, match="can't make 'adamw': apex.optimizers.FusedAdam requires cuda extensions; \"auto\""):
        build_optimizer(section(impl="apex"), model().named_parameters())


@pytest.fixture
def apex(monkeypatch, on_gpu):
    """NVIDIA apex, as far as it is called; what it was called with."""
    seen = {}
    fake = ModuleType("apex.optimizers")
    fake.FusedAdam = lambda groups, **settings: seen.update(settings, names=[group["name"] for group in groups])
    fake.FusedSGD = lambda groups, **settings: seen.update(sgd=settings)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake)
    return seen


def test_apex_and_the_engine_s_makers_get_the_groups(apex):
    seen = apex
    build_optimizer(section(impl="apex"), model().named_parameters())
    assert seen == {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "adam_w_mode": True, "names": ["decay", "no_decay"]}
    build_optimizer(section(impl="apex", name="sgd"), model().named_parameters())
    assert seen["sgd"] == {"lr": 1e-2, "momentum": 0.9}

    def maker(groups, optimizer):
        return torch.optim.RMSprop(groups, lr=optimizer.lr)

    made = build_optimizer(section(impl="deepspeed"), model().named_parameters(), {"deepspeed": maker})
    assert isinstance(made, torch.optim.RMSprop)


def test_apex_on_a_cpu_and_under_zero_3_is_refused(apex, monkeypatch):
    """It counts the steps of a group, and DeepSpeed steps a group's pieces one after the other there."""
    with pytest.raises(ValueError, match="counts the steps of a whole parameter group, which ZeRO 3 steps in pieces"):
        build_optimizer(section(impl="apex"), model().named_parameters(), zero_stage=3)
    monkeypatch.setattr(optimizer, "device_type", lambda groups: "cpu")
    with pytest.raises(ValueError, match="NVIDIA apex's optimizers need a GPU; \"auto\" takes what can"):
        build_optimizer(section(impl="apex"), model().named_parameters())


def measured(monkeypatch, *order: str) -> None:
    monkeypatch.setitem(REGISTRY.table["measured"], "cuda", {"optimizer": list(order)})


def test_auto_takes_the_fastest_that_can_serve_and_logs_why(monkeypatch, apex, caplog):
    def unbuilt(groups, optimizer):
        raise RuntimeError("it is not built\nsecond line")

    measured(monkeypatch, "deepspeed", "unheard_of", "apex", "torch")
    with caplog.at_level(logging.INFO, logger="megalm.optim.optimizer"):
        build_optimizer(section(), model().named_parameters(), {"deepspeed": unbuilt})
        third = build_optimizer(section(), model().named_parameters(), {"deepspeed": unbuilt}, zero_stage=3)
    assert apex["names"] == ["decay", "no_decay"] and isinstance(third, torch.optim.AdamW)
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "optimizer adamw on cuda: apex (the fastest that serves on cuda; not deepspeed: it is not built)"
    assert second.startswith("optimizer adamw on cuda: torch (the fastest that serves on cuda; not deepspeed: ")
    assert "; not apex: its FusedAdam counts the steps" in second
    measured(monkeypatch, "deepspeed")
    with pytest.raises(ValueError, match=r"'auto' finds none for 'adamw' on cuda \(not deepspeed: it is not built\)"):
        build_optimizer(section(), model().named_parameters(), {"deepspeed": unbuilt})


def test_the_shipped_table_knows_the_implementations():
    impls = set(get_args(Optimizer.model_fields["impl"].annotation)) - {"auto"}
    orders = [REGISTRY.table["optimizer"], *(orders["optimizer"] for orders in REGISTRY.table["measured"].values())]
    assert set(orders[0]) == impls and all(set(order) <= impls and "torch" in order for order in orders)


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(section(), [])


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_linearly_to_the_peak(decay):
    rates = [lr_at(schedule(decay, warmup_steps=4), 0.8, 100, step) for step in range(6)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)


def test_cosine():
    plan = schedule("cosine", warmup_steps=10, min_lr=0.1)
    assert lr_at(plan, 1.0, 110, 60) == pytest.approx(0.55)
    assert lr_at(plan, 1.0, 110, 35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_at(plan, 1.0, 110, 110) == lr_at(plan, 1.0, 110, 10**6) == pytest.approx(0.1)


def test_linear():
    plan = schedule("linear", min_lr=0.2)
    assert [lr_at(plan, 1.0, 4, step) for step in range(6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_wsd_stays_and_then_falls_over_the_last_steps():
    plan = schedule("wsd", warmup_steps=5, min_lr=0.1)
    assert {lr_at(plan, 1.0, 100, step) for step in range(5, 91)} == {1.0}
    assert lr_at(plan, 1.0, 100, 95) == pytest.approx(0.55)
    assert lr_at(schedule("wsd", decay_steps=50), 1.0, 100, 75) == pytest.approx(0.5)
    assert lr_at(schedule("wsd", warmup_steps=90, decay_steps=50), 1.0, 100, 90) == 1.0, "never before the warm-up ends"


def test_constant():
    assert {lr_at(schedule("constant", min_lr=0.1), 0.5, 10, step) for step in (0, 5, 100)} == {0.5}


def test_decay_steps_shorten_the_fall():
    plan = schedule("linear", warmup_steps=2, decay_steps=4)
    assert [lr_at(plan, 1.0, 100, step) for step in range(8)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("total, warmup, length", [(1, 0, None), (1, 1, None), (3, 5, None), (7, 2, 1), (1000, 10, 100)])
def test_rates_are_between_the_bounds_and_never_rise_after_the_warm_up(decay, total, warmup, length):
    plan = schedule(decay, warmup, 0.01, length)
    rates = [lr_at(plan, 0.5, total, step) for step in range(total + 3)]
    assert all(0 < rate <= 0.5 for rate in rates)
    falling = rates[warmup:]
    assert all(a >= b >= 0.01 for a, b in zip(falling, falling[1:], strict=False))
    assert rates[0] == (0.5 if warmup == 0 else 0.5 / warmup), "the first step isn't lost"


def test_a_floor_above_the_peak():
    with pytest.raises(ValueError, match="schedule.min_lr 0.6 is above optimizer.lr 0.5"):
        lr_at(schedule(min_lr=0.6), 0.5, 10, 0)


def test_a_state_dict_moves_between_equal_models():
    """Groups come in the same order whatever the parameters: state goes back to where it was."""
    net, other = model(), model()
    for this in (net, other):
        this.zero_grad()
        this(torch.tensor([1, 2])).square().sum().backward()
    one, two = (build_optimizer(section(), this.named_parameters()) for this in (net, other))
    one.step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert [group["name"] for group in two.param_groups] == ["decay", "no_decay"]
    assert torch.equal(two.state[other[0].weight]["exp_avg"], one.state[net[0].weight]["exp_avg"])
