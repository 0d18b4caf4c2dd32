"""Times and utilisation from a clock that the test turns, and the table of peaks."""

from __future__ import annotations

import pytest

from megalm.config.schema import Precision
from megalm.metrics import peak_flops
from megalm.metrics.devices import PEAKS
from megalm.metrics.throughput import Throughput
from megalm.plan import flops, make_plan
from tests.metrics.conftest import make_config


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_median_step_counts_and_evaluations_do_not(config, plan):
    clock = Clock()
    throughput = Throughput(config, plan, clock, device="")
    for seconds in (5.0, 1.0, 1.0):  # the first step is slow
        clock.now += seconds
        throughput.step()
    assert throughput.report() == {"step_seconds": 1.0, "tokens_per_second": 32.0}
    clock.now += 1000.0
    throughput.restart()
    clock.now += 2.0
    throughput.step()
    assert throughput.report() == {"step_seconds": 2.0, "tokens_per_second": 16.0}


def test_mfu_counts_the_flops_of_the_model_on_all_ranks(tmp_path):
    config = make_config(tmp_path)
    config = config.model_copy(update={"precision": Precision(dtype="bf16")})
    plan = make_plan(config, 4, 257)
    clock = Clock()
    throughput = Throughput(config, plan, clock, device="NVIDIA H200")
    clock.now += 0.5
    throughput.step()
    expected = flops.per_token(config, plan.padded_vocab_size) * 32 / 0.5 / (4 * 989.5e12)
    assert throughput.report()["mfu"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "fp16", 756.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_peaks_by_name(name, dtype, teraflops):
    assert peak_flops(name, dtype) == teraflops * 1e12


@pytest.mark.parametrize(("name", "dtype"), [("Tesla V100-SXM2-16GB", "bf16"), ("NVIDIA A1000", "bf16"), ("a new one", "bf16")])
def test_an_unknown_peak_is_none(name, dtype):
    assert peak_flops(name, dtype) is None


def test_every_key_is_reachable_and_half_precision_is_faster():
    for key, peak in PEAKS.items():
        assert peak_flops(" ".join(key), "fp16") == peak.fp16 * 1e12, key
        assert peak.fp32 < peak.fp16 and peak.source
