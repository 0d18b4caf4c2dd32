"""`megalm checkpoint`: what it prints, and its exit codes."""
from __future__ import annotations

import json

import pytest
import torch

from megalm.checkpoint import find
from megalm.tools.checkpoint import main
from tests.checkpoint.fakes import SMALL, draw, engines, plant, save_all
from tests.checkpoint.test_layouts import succeed


@pytest.fixture
def run(tmp_path):
    """Two checkpoints of one run, by two ranks."""
    for step, seed in ((1, 0), (2, 1)):
        succeed(save_all(tmp_path, step, engines(SMALL, draw(SMALL, seed=seed), tp=2), eval_loss=1.25))
    return tmp_path


def test_inspect_shows_every_part_and_its_shape(run, capsys):
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in SMALL) and "64 x 12" in text and "master, exp_avg, exp_avg_sq" in text
    assert "step_00000002" in text and "1.2500" in text and "2 ranks" in text


def test_inspect_and_verify_count_the_same_bytes(run, capsys):
    held = [path.stat().st_size for path in (run / "checkpoints/step_00000002").iterdir()]
    for command in ("inspect", "verify"):
        assert main([command, str(run)]) == 0
        assert f" {sum(held):,} bytes in {len(held)} files\n" in capsys.readouterr().out, command


def test_inspect_for_programs(run, capsys):
    assert main(["inspect", str(run / "checkpoints/step_00000001"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["eval_loss"], found["world_size"]) == (1, 1.25, 2)
    assert {(tensor["part"], tuple(tensor["shape"])) for tensor in found["tensors"]} == {
        (part, shape) for part, (shape, _) in SMALL.items()}
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == sum(4 * value.numel() for value in draw(SMALL).values())


def test_verify_reads_every_byte(run, capsys):
    folder = run / "checkpoints/step_00000002"
    assert main(["verify", str(run), "--all"]) == 0
    assert capsys.readouterr().out.count(": sound: ") == 2
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        for place in (0, len(before) // 2, len(before) - 1):
            content = bytearray(before)
            content[place] ^= 4
            path.write_bytes(content)
            assert main(["verify", str(folder)]) == 1, (path.name, place)
            assert path.name in capsys.readouterr().out
        path.write_bytes(before)
    assert main(["verify", str(run)]) == 0


def test_verify_finds_a_header_that_says_something_else(run, capsys):
    """A file that is sound by its hashes, and whose two descriptions don't agree."""
    folder = run / "checkpoints/step_00000002"
    plant(folder, "rank_00000.json", lambda index: index["fragments"][0].update(key=index["fragments"][0]["key"] + "#9"))
    assert main(["verify", str(folder)]) == 1
    assert "header and index don't say the same" in capsys.readouterr().out


def test_diff_tells_counters_settings_layout_weights_and_moments_apart(run, capsys):
    one, other = (str(run / f"checkpoints/step_0000000{step}") for step in (1, 2))
    assert main(["diff", one, one]) == 0
    assert capsys.readouterr().out == "nothing differs\n"
    plant(run / "checkpoints/step_00000002", "config.json", lambda config: config["train"].update(seed=9))
    plant(run / "checkpoints/step_00000002", "plan.json", lambda plan: plan.update(tp=7, vocab_size=61))
    assert main(["diff", one, other]) == 1
    text = capsys.readouterr().out
    assert text.startswith("step: 1 and 2\nconsumed_samples: 8 and 16\nconfig.train.seed: 1 and 9\nplan.vocab_size: 60 and 61\n")
    largest = (draw(SMALL, seed=0)["head.weight", "master"] - draw(SMALL, seed=1)["head.weight", "master"]).abs().max().item()
    assert f"master of head.weight: 768 of 768 elements, largest difference {largest:.3g}\n" in text
    number = len(SMALL)
    assert text.endswith(f"different: 2 counters, 1 setting, 1 fact of the layout, {number} weights, {2 * number} moments\n")


def test_diff_of_what_is_damaged_ends_as_verify_does(run, capsys):
    path = run / "checkpoints/step_00000002/rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    assert main(["diff", str(run / "checkpoints/step_00000001"), str(path.parent)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: rank_00001.safetensors") and error.count("\n") == 1
    assert "`megalm checkpoint verify` says of each" in error


def test_diff_says_which_side_has_no_config(run, capsys):
    """As another program's writer may leave it out."""
    one, other = (run / f"checkpoints/step_0000000{step}" for step in (1, 2))
    plant(other, "checkpoint.json", lambda manifest: [manifest["files"].pop(name) for name in ("config.json", "plan.json")])
    assert main(["diff", str(one), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{other}: has no config.json; has no plan.json", "step: 1 and 2", "consumed_samples: 8 and 16"]
    assert not any(line.startswith(("config", "plan")) for line in lines)


def test_diff_compares_what_both_have(tmp_path, capsys):
    """A run's checkpoint, with fp32 masters and moments, and a converted one, with weights alone and no padding."""
    values, parts = draw(SMALL), {**SMALL, "embedding.word.weight": ((60, 12), 0)}
    values["final_norm.weight", "master"][3] = 0
    run, converted = (tmp_path / name for name in ("run", "converted"))
    succeed(save_all(run, 1, engines(SMALL, values, tp=2, dp=2)))
    weights = {(part, "weight"): values[part, "master"][: parts[part][0][0]].bfloat16() for part in SMALL}
    weights["final_norm.weight", "weight"][3] += 1
    succeed(save_all(converted, 0, engines(parts, weights, roles=("weight",), dtype=torch.bfloat16)))
    plant(find(converted), "config.json", lambda config: (config["train"].update(seed=9), config["model"].update(hidden_size=13)))
    assert main(["diff", str(run), str(converted)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "only in" in line] == [f"only in {run}: moments"]
    assert [line for line in lines if line.startswith("master and weight of")] == [
        "master and weight of embedding.word.weight: the same, and 64 and 60 rows with the padding",
        "master and weight of final_norm.weight: 1 of 12 elements, largest difference 1"]
    assert lines[0] == f"{converted}: weights alone, of no run: of its config, only what model they are counts"
    assert lines[1] == "config.model.hidden_size: 12 and 13" and lines[-1] == "different: 1 setting, 2 weights"
    assert main(["diff", str(converted), str(run)]) == 1
    assert f"only in {run}: moments" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, line", [
    (["inspect", "nowhere"], "nowhere: no such folder"), (["verify", "nowhere"], "nowhere: no such folder"),
    (["inspect", "file"], "file: not a folder"), (["verify", "file"], "file: not a folder"),
    (["verify", "."], ".: no checkpoint here"), (["diff", "."], "the following arguments are required"), ([], "command")])
def test_mistakes_are_one_line(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
