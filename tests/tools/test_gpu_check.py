"""gpu_check without a GPU: a dry run of every stage, and what becomes of workers that crash, hang or run out of time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megalm.tools import gpu_check
from megalm.tools.build_kernels import build_shim
from megalm.tools.gpu import report, stages, supervise, training
from megalm.tools.gpu.stages import Settings
from megalm.tools.gpu.supervise import STAGES, Stage
from megalm.tools.kernel_cases import MODULES


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


def test_dry_run(library, tmp_path, capfd):
    """Every stage, but for its sizes and the device, as on a GPU."""
    out = tmp_path / "found.json"
    code = gpu_check.main(["--dry-run", "--shim", str(library), "--out", str(out), "--seed", "1"])
    document = json.loads(out.read_text())
    assert code == 0, report.failures(document)
    assert {name: part["status"] for name, part in document["stages"].items()} == {stage.name: "done" for stage in STAGES}
    assert all(len(part["results"]) == part["items"] for part in document["stages"].values())
    case, own, bench, run = (document["stages"][stage]["results"][place]
                             for stage, place in (("cases", 0), ("cases", -1), ("bench", -1), ("train", -1)))
    assert case["ratio"] > 0 and own["kernel"] == "own"
    assert "megalm" in bench["seconds"] and len(run["losses"]) == training.DRY_RUN[0].steps
    assert any("torch.compile" in result.get("seconds", {}) for result in document["stages"]["bench"]["results"])
    table = out.with_suffix(".md").read_text()
    assert "Nothing that was tried." in table and "| tiny | megalm |" in table
    assert table in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_is_one_error(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "found.json")]) == 2
    assert capsys.readouterr().err == "error: ValueError: torch sees no GPU here; --dry-run shows the stages on a CPU\n"


# The supervisor, with workers that misbehave.

WORKER = """
import json, os, signal, sys, time
order = json.loads(sys.argv[2])
def answer(**event):
    with open(order["out"], "a") as file:
        print(json.dumps(event), file=file)
behaviours = order["behaviours"]
print("started at", order["first"], flush=True)
if behaviours == "broken":
    sys.exit("no items here")
answer(items=len(behaviours))
for index in range(order["first"], len(behaviours)):
    if order["count"] == index - order["first"]:
        break
    answer(begin=index, name=behaviours[index])
    if behaviours[index] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviours[index] == "hang":
        time.sleep(60)
    answer(end=index, result={"pid": os.getpid()}, took=0.0)
    if behaviours[index] == "leaves an error":
        sys.exit(3)
"""


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """follow(behaviours, seconds=, fresh=) -> the part of the document."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(supervise, "command", lambda: [sys.executable, str(script)])

    def run(behaviours, seconds=60.0, fresh=False):
        part, saved = {"results": []}, []
        supervise.supervise(Stage("cases", 1, 1.0, fresh), {"behaviours": behaviours}, seconds, part, tmp_path / "log",
                            lambda: saved.append(len(part["results"])))
        assert saved == sorted(saved) and saved[-1] == len(part["results"])
        return part

    return run


def test_a_crash_or_a_hang_loses_one_item(follow):
    part = follow(["fine", "crash", "fine", "hang", "leaves an error", "fine"])
    assert part["status"] == "done" and part["items"] == 6
    assert [result.get("failed") for result in part["results"]] == [
        None, "the process ended: signal 11 (SIGSEGV)", None, "the process took more than 1 s", None, None]
    assert "started at 0" in part["results"][1]["output"]
    pids = [result.get("pid") for result in part["results"]]
    assert len({pids[0], pids[2], pids[4], pids[5]}) == 4


def test_fresh_items_have_processes_of_their_own(follow):
    assert len({result["pid"] for result in follow(["fine"] * 3, fresh=True)["results"]}) == 3
    assert len({result["pid"] for result in follow(["fine"] * 3)["results"]}) == 1


def test_the_limit_on_time_keeps_what_was_done(follow):
    start = time.monotonic()
    part = follow(["fine", "hang", "fine"], seconds=0.7)
    assert part["status"] == "stopped at its limit on time, 1 of 3 done" and len(part["results"]) == 1
    assert time.monotonic() - start < 10


def test_a_stage_that_cannot_start_says_why(follow):
    part = follow("broken")
    assert part["status"] == "failed: the process ended: exit code 1" and "no items here" in part["output"]


def test_stages_go_on_after_one_that_failed(monkeypatch, tmp_path, capsys):
    def fake(stage, settings, seconds, part, log, changed):
        part.update(status="failed: planted" if stage.name == "cases" else "done", items=1, seconds=1.0)
        part["results"].append({"name": "only", "device": "NVIDIA H200", "summary": "0 errors", "limit": seconds})
        changed()

    monkeypatch.setattr(supervise, "supervise", fake)
    out = tmp_path / "found.json"
    assert gpu_check.main(["--out", str(out), "--minutes", "1", "--stages", "build", "cases", "sanitize"]) == 1
    document = json.loads(out.read_text())
    assert list(document["stages"]) == ["build", "cases", "sanitize"] and document["device"] == "NVIDIA H200"
    limits = [part["results"][0]["limit"] for part in document["stages"].values()]
    assert limits == pytest.approx([60 * 0.7, 60 * 0.35, 60], abs=1)  # of what is left, and the fake takes no time
    assert "- cases: failed: planted" in capsys.readouterr().out


def test_names_of_files():
    name = supervise.default_path("NVIDIA H200 NVL", False)
    assert name.parent.parts[-2:] == ("benchmarks", "gpu") and name.name.startswith("nvidia-h200-nvl-20")


# The stages' own arithmetic.

SETTINGS = Settings("cases", 0, None, "", True, None, 1)


class Drawn:
    """A case whose kernel is as exact as plain torch but for an outlier in some draws."""

    def __init__(self, outliers: int):
        self.outliers, self.draws = outliers, 0

    def compare(self, dtype, device):
        self.draws += 1
        noise = torch.full((1, 40), 1e-6, dtype=torch.float64)
        ours, plain = noise.clone(), noise.clone()
        if self.draws <= self.outliers:
            ours[0, 0] = 3e-6
        if self.draws == 2:
            plain[0, 0] = 2e-6
        return [(ours, plain, torch.zeros(1, 40, dtype=torch.float64))]


def test_an_outlier_among_few_elements_is_decided_by_more_draws():
    lucky = Drawn(outliers=0)
    stages._errors(SETTINGS, lucky, torch.float32)
    assert lucky.draws == 1
    once = Drawn(outliers=1)
    assert stages._errors(SETTINGS, once, torch.float32)[0] == pytest.approx((1e-6, 1e-6), rel=0.1)
    assert once.draws == stages.DRAWS
    worse = Drawn(outliers=10)
    worse.compare = lambda dtype, device: [(torch.full((1, 40), 3e-6).double(), torch.full((1, 40), 1e-6).double(),
                                            torch.zeros(1, 40).double())]
    with pytest.raises(AssertionError, match="rms error 3e-06, plain torch 1e-06"):
        stages._errors(SETTINGS, worse, torch.float32)


def test_inputs_are_made_on_the_cpu_where_a_case_mixes_devices():
    devices = []

    def run():
        from megalm.tools.kernel_cases.accuracy import _drawn

        devices.append(_drawn[-1])
        if len(devices) == 1:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
        return "made"

    assert stages._drawn(SETTINGS._replace(dry_run=False, seed=5), 1, run) == "made"
    assert devices == [(1_000_008, "cuda"), (1_000_008, "cpu")]


def test_where_time_ends_every_operation_has_had_some():
    assert stages.in_turn([[1, 2, 3], [], [4], [5, None]]) == [1, 4, 5, 2, None, 3]
    names = [case.name for size, case in stages._all_cases(SETTINGS._replace(dry_run=False)) if size == "large"]
    assert {name.split()[0] for name in names[:len(MODULES)]} == {name.split()[0] for name in names}


def test_both_counts_of_flops():
    made = training.config(training.DRY_RUN[0])
    found = training.utilisation(made, 128, 1000.0, "cpu")
    # Scores and context of 2 heads of 64 over (8 + 1) / 2 positions, two FLOPs each, forward and twice backward, in 1 layer.
    assert found["flops_per_token_full"] - found["flops_per_token"] == 3 * 2 * 2 * 2 * 64 * 4.5
    assert "mfu" not in found


def test_sets_of_backends():
    long, short = training.RUNS[2], training.DRY_RUN[1]
    assert long.kernels == short.kernels == "reference"
    assert training.backends(long)["attention"] == "torch" and training.backends(short)["attention"] == "reference"
    assert training.backends(long)["norm"] == "reference" and training.backends(training.RUNS[0])["norm"] == "megalm"
    assert training.backends(training.RUNS[0])["attention"] in ("megalm", "torch")


def test_parity_is_at_most_twice_the_distance_of_torch():
    def document(megalm):
        runs = {"megalm": [7.0, megalm], "torch": [7.0, 6.04], "reference": [7.0, 6.0]}
        return {"stages": {"train": {"status": "done", "items": 3, "results": [
            {"name": name, "model": "1B", "set": name, "losses": losses} for name, losses in runs.items()]}}}

    (fine,), (bad,) = report.parity(document(6.07)), report.parity(document(6.1))
    assert fine["met"] and fine["largest"] == pytest.approx({"megalm": 0.07, "torch": 0.04}) and not bad["met"]
    assert report.failures(document(6.07)) == []
    assert report.failures(document(6.1)) == ["train: 1B: a loss is 0.1 from reference's, allowed 0.08"]


FAKE_SANITIZER = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != --error-exitcode ]; do shift; done
code=$2; shift 2
[ "$1" = --report-api-errors ] && shift 2
"$@" || exit 1
echo "========= ERROR SUMMARY: {errors} errors"
[ {errors} = 0 ] || exit $code
"""
FAKE_PROBE = """
import json, sys
with open(json.loads(sys.argv[2])["out"], "a") as file:
    print(json.dumps({"items": 1}), json.dumps({"end": 0, "result": RESULT, "took": 0.0}), sep="\\n", file=file)
"""


@pytest.fixture
def sanitize(library, tmp_path, monkeypatch):
    """sanitize(errors, result=of the probe; None: a real one) -> what the stage found."""
    def run(errors, result=None):
        program = tmp_path / "compute-sanitizer"
        program.write_text(FAKE_SANITIZER.format(log=tmp_path / "log", errors=errors))
        program.chmod(0o755)
        if result is not None:
            (tmp_path / "probe.py").write_text(FAKE_PROBE.replace("RESULT", repr(result)))
            monkeypatch.setattr(stages, "command", lambda: [sys.executable, str(tmp_path / "probe.py")])
        return stages._sanitize(SETTINGS._replace(shim=str(library)), str(program), "memcheck", "norm")

    return run


def test_the_sanitizer_is_read(sanitize, tmp_path):
    assert sanitize(0) == {"summary": "ERROR SUMMARY: 0 errors"}
    assert "--tool memcheck" in (tmp_path / "log").read_text()
    found = sanitize(2, {})
    assert found["failed"] == "exit code 86" and found["summary"] == "ERROR SUMMARY: 2 errors" and found["output"]
    # The kernels failed, and the sanitizer found nothing.
    assert sanitize(0, {"failed": "RuntimeError: planted"})["failed"] == "RuntimeError: planted"


def test_a_table_that_cannot_be_made_costs_nothing_else(tmp_path):
    record = supervise.Record(tmp_path / "found.json", {"device": "cpu"})
    record.begin("bench", 1.0).update(status="done", items=1, results=[{"name": "odd", "seconds": 3}])
    record.save(table=True)
    assert json.loads((tmp_path / "found.json").read_text())["stages"]["bench"]["results"][0]["name"] == "odd"
    assert "no table, " in (tmp_path / "found.md").read_text()


def test_a_worker_ends_with_its_supervisor(tmp_path):
    (tmp_path / "worker.py").write_text(f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
                                        "time.sleep(60)\n")
    code = ("import os, sys, time\nfrom pathlib import Path\nfrom megalm.tools.gpu import supervise\n"
            "folder = Path(sys.argv[1])\nsupervise.command = lambda: [sys.executable, str(folder / 'worker.py')]\n"
            "worker = supervise.Worker(supervise.MACHINE, {}, 0, folder / 'log')\n"
            "while not (folder / 'pid').exists() or not (folder / 'pid').read_text(): time.sleep(0.01)\n"
            "assert worker.ended() is None\nos._exit(7)\n")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 7
    process, deadline = Path("/proc") / (tmp_path / "pid").read_text(), time.monotonic() + 10
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process.exists()
