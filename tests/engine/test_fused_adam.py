"""Optimizers that keep their step as DeepSpeed's and NVIDIA apex's do: counted, saved and set under every wrapper."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megalm.engine import fused_adam as module
from megalm.engine.fused_adam import fused_adam
from tests import dist
from tests.engine.fused import STEPS, resumed

MODEL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 61, "vocab_multiple": 4}
WRAPPERS = [("fp32", {"zero_stage": 0}), ("fp32", {"zero_stage": 1}), ("bf16", {"zero_stage": 1}), ("bf16", {"pp": 2})]
# With apex's, ZeRO 3 is refused (tests/optim).
CASES = [*((kind, *wrapper) for kind in ("deepspeed", "apex") for wrapper in WRAPPERS), ("deepspeed", "fp32", {"zero_stage": 3})]


@pytest.mark.parametrize("kind, dtype, parallel", CASES)
def test_a_resume_counts_on(kind, dtype, parallel):
    """Bit for bit: the bias corrections depend on the step."""
    sections = {"model": MODEL, "precision": {"dtype": dtype}, "parallel": parallel, "batch": {"micro": 1, "global": 2}}
    for result in dist.run(resumed, parallel.get("pp", 1), kind, sections):
        assert (result["fresh"], result["counted"], result["last"]) == (0, STEPS // 2, STEPS)
        assert result["steps of moments"] == {STEPS // 2} and result["roles"] == {"master", "exp_avg", "exp_avg_sq"}
        for plain, whole, again in zip(result["plain"], result["whole"], result["resumed"], strict=True):
            assert torch.equal(whole, again)
            torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-5)


GROUPS = [{"params": [torch.zeros(2)], "name": "decay", "weight_decay": 0.1}]
SECTION = SimpleNamespace(name="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


@pytest.fixture
def deepspeed(monkeypatch):
    """DeepSpeed with its operation built for CUDA; what FusedAdam was called with."""
    seen = {}
    info, adam = ModuleType("deepspeed.git_version_info"), ModuleType("deepspeed.ops.adam")
    info.installed_ops, info.accelerator_name = {"fused_adam": True}, "cuda"
    adam.FusedAdam = lambda groups, **settings: seen.update(settings, groups=groups)
    accelerator = ModuleType("deepspeed.accelerator")
    accelerator.get_accelerator = lambda: SimpleNamespace(_name="cuda")
    for fake in (info, adam, accelerator):
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(module, "device_type", lambda groups: "cuda")
    return seen, info


def test_deepspeed_s_is_made_where_it_is_built(deepspeed):
    seen, _ = deepspeed
    fused_adam(GROUPS, SECTION)
    assert seen == {"groups": GROUPS, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "adam_w_mode": True}


def test_nothing_is_compiled(deepspeed):
    """Its loader compiles what wasn't built, or was built for another accelerator."""
    seen, info = deepspeed
    info.accelerator_name = "cpu"
    with pytest.raises(RuntimeError, match="is not built; DS_BUILD_FUSED_ADAM=1"):
        fused_adam(GROUPS, SECTION)
    info.accelerator_name, info.installed_ops = "cuda", {"fused_adam": False}
    with pytest.raises(RuntimeError, match="is not built; DS_BUILD_FUSED_ADAM=1"):
        fused_adam(GROUPS, SECTION)
    with pytest.raises(RuntimeError, match="fused optimizer is Adam's"):
        fused_adam(GROUPS, SimpleNamespace(name="sgd"))
    assert not seen


def test_on_a_cpu_the_installed_deepspeed_has_none():
    with pytest.raises(RuntimeError, match="needs a GPU"):
        fused_adam(GROUPS, SECTION)
