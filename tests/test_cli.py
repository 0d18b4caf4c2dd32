"""The `megalm` command: answers at once, imports nothing heavy, finds typos, survives a closed pipe."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from megalm import cli


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "megalm.cli", *arguments], capture_output=True, text=True, timeout=60)


def test_help_names_every_command_and_imports_nothing_heavy():
    program = (
        "import sys, json; from megalm import cli; code = cli.main(['--help']);"
        "print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    *text, last = result.stdout.splitlines()
    code, modules = json.loads(last)
    assert code == 0
    assert not {"torch", "numpy", "pydantic", "deepspeed"} & set(modules)
    assert all(any(line.split()[:1] == [name] for line in text) for name in cli.COMMANDS)


def test_every_command_names_a_module_that_is_there():
    assert [module for module, _ in cli.COMMANDS.values() if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize(("typo", "meant"), [("trian", "train"), ("preproces", "preprocess"), ("generat", "generate")])
def test_an_unknown_command_suggests_the_nearest(typo, meant, capsys):
    assert cli.main([typo]) == 2
    error = capsys.readouterr().err
    assert f"`megalm {meant}`" in error and error.count("\n") == 1


def test_a_word_near_nothing_lists_the_commands(capsys):
    assert cli.main(["xyzzy"]) == 2
    assert "train, plan" in capsys.readouterr().err


def test_no_command_is_an_error(capsys):
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_train_without_a_config_is_one_error():
    result = run("train")
    assert result.returncode == 2 and "no config file given" in result.stderr and "Traceback" not in result.stderr


def test_train_with_a_missing_config_is_one_error(tmp_path):
    result = run("train", str(tmp_path / "absent.json"))
    assert result.returncode == 2 and "absent.json" in result.stderr and "Traceback" not in result.stderr


def test_version():
    assert run("--version").stdout.startswith("megalm ")


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m megalm.cli --help | true; exit ${{PIPESTATUS[0]}}"
    # `true` may end before or after the text is written: either way no traceback.
    for _ in range(3):
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert result.stderr == "" and result.returncode in (0, 141)
