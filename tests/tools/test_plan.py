"""`megalm plan`: a table for people, JSON for programs, one line a mistake, and no torch."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.tools.plan import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = str(CONFIGS / "quickstart.json")
LARGE = str(CONFIGS / "llama3_70b.json")


def test_table(capsys):
    assert main([LARGE, "--nodes", "8", "--gpus-per-node", "8"]) == 0
    text = capsys.readouterr().out
    for line in ("8 nodes x 8 GPUs = 64 ranks", "tp 8 x pp 4 x dp 2, sequence parallel", "70,553,706,496 parameters",
                 "1024 = micro 1 x dp 2 x accumulation 512", "ranks 56-63  stage 3, dp 1, tp 0-7  (node 7)", "BF16_Optimizer",
                 "GiB on each rank"):
        assert line in text
    assert main([SMALL]) == 0
    assert "MiB on each rank" in capsys.readouterr().out


def test_many_ranks_are_cut_short(capsys):
    assert main([str(CONFIGS / "gpt_1t.json"), "--nodes", "384"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    assert any("369 more tp groups" in line for line in lines)


def test_json_has_every_rank(capsys):
    assert main([LARGE, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["nodes"], facts["gpus_per_node"]) == (4, 8)      # the smallest cluster that fits
    assert len(facts["ranks"]) == 32 and facts["ranks"][9] == [1, 0, 1]
    assert [stage["transformer_layers"] for stage in facts["stages"]] == [20, 20, 21, 19]
    assert facts["plan"]["stages"][-1] == len(facts["plan"]["layers"])
    for stage in facts["stages"]:
        sizes = dict(stage["bytes_per_rank"])
        assert sizes.pop("total") == sum(sizes.values())


def test_overrides_stand_before_and_after_options(capsys):
    assert main([SMALL, "batch.micro=2", "--json", "batch.global=64"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["micro_batch"], plan["global_batch"], plan["accumulation_steps"]) == (2, 64, 16)


def test_tp_across_nodes_is_noted(capsys):
    assert main([LARGE, "--nodes", "8", "--gpus-per-node", "4"]) == 0
    assert "tp groups of 8 ranks cross nodes of 4 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, lines", [
    ([SMALL, "parallel.tp=5", "model.hiden=3"], [
        "model.hiden: unknown key (value 3); did you mean model.hidden_size?",
        "model.num_attention_heads: 4 is not divisible by parallel.tp = 5",
        "model.num_query_groups: 2 groups on parallel.tp = 5",
        "model.ffn_hidden_size: 384 is not divisible by parallel.tp = 5",
        "model.vocab_multiple: 128 is not divisible by parallel.tp = 5",
        "model.seq_length: 128 is not divisible by parallel.tp = 5"]),
    ([SMALL, "--nodes", "3", "--gpus-per-node", "4"], [
        "world size 12 is not parallel.tp x parallel.pp x parallel.dp = 2 x 2 x 2 = 8"]),
    ([LARGE, "batch.global=1000", "--nodes", "12"], [
        "batch.global = 1000 is not divisible by batch.micro x dp = 1 x 3 = 3; the next that fit are 999 and 1002"]),
    ([LARGE, "model.vocab_size=null"], ["model.vocab_size: missing, and no tokenizer tells it"]),
    ([SMALL, "--nodes", "0"], ["argument --nodes: 0 is not a number of at least 1"]),
    (["nowhere.json"], ["nowhere.json: no such file"]),
])
def test_mistakes_are_lines_and_code_2(arguments, lines, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    found = output.err.splitlines()
    assert len(found) == len(lines)
    for expected, line in zip(lines, found, strict=True):
        assert line.startswith(f"error: {expected}")


def test_the_tokenizer_is_asked_where_it_is(tmp_path, capsys):
    own = [SMALL, "tokenizer.type=bytes", "tokenizer.path=null", "--json"]
    assert main([*own, "model.vocab_size=null"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["vocab_size"] == 257
    assert main([*own, "model.vocab_size=200"]) == 2
    assert "200 is smaller than the tokenizer's vocabulary of 257" in capsys.readouterr().err
    broken = tmp_path / "spm.model"
    broken.write_text("not a model")
    assert main([SMALL, f"tokenizer.path={broken}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_no_torch_is_imported():
    code = ("import sys; from megalm.tools.plan import main; code = main(sys.argv[1:]); "
            "print(code, sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, LARGE], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
