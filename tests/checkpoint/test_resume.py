"""When a run may go on from a checkpoint."""
from __future__ import annotations

import copy
import json

import pytest

from megalm.checkpoint import CheckpointError, check_resume, check_start, choose, differences, replaces_all
from megalm.checkpoint.resume import flatten
from tests.checkpoint.fakes import SMALL, draw, engines, plan, save_all, settings
from tests.checkpoint.test_layouts import succeed
from tests.config.trees import config

CONFIG = {
    "model": {"hidden_size": 64, "vocab_multiple": 128, "vocab_size": None, "rotary_scaling": {"type": "linear", "factor": 2.0}},
    "parallel": {"tp": 2}, "batch": {"global": 8}, "schedule": {"decay": "cosine"},
    "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]},
    "data": {"train": [{"path": "a", "weight": 1.0}], "valid": [], "seed": None, "cache": None},
    "train": {"seed": 1, "steps": 10},
    "tokenizer": {"type": "huggingface", "path": "t.json", "eod": "<eos>"},
}


def changed(path: str, value) -> dict:
    config = copy.deepcopy(CONFIG)
    *above, name = path.split(".")
    section = config
    for key in above:
        section = section[int(key)] if key.isdigit() else section[key]
    section[name] = value
    return config


def test_a_checkpoint_may_be_older_than_keys_whose_default_depends_on_others():
    now = config(model={"bias": False, "head_dim": 8}).model_dump(mode="json")
    newer = ("head_dim", "qkv_bias", "mlp_bias", "parallel_residual", "sliding_window", "rotary_fraction")
    before = {**now, "model": {key: value for key, value in now["model"].items() if key not in newer}}
    assert differences(before, now) == []
    now["model"] |= {"head_dim": 16, "qkv_bias": True, "sliding_window": 4}
    assert [str(difference) for difference in differences(before, now)] == [
        "model.sliding_window: stored None, now 4", "model.qkv_bias: stored False, now True", "model.head_dim: stored 8, now 16"]


@pytest.mark.parametrize("path, value, line", [
    ("model.hidden_size", 65, "model.hidden_size: stored 64, now 65"),
    ("model.rotary_scaling", None, "model.rotary_scaling.type: stored 'linear', now nothing"),
    ("optimizer.lr", 0.2, "optimizer.lr: stored 0.1, now 0.2"),
    ("optimizer.betas", [0.9, 0.99], "optimizer.betas[1]: stored 0.95, now 0.99"),
    ("data.train.0.path", "b", "data.train[0].path: stored 'a', now 'b'"),
    ("data.valid", [{"path": "v"}], "data.valid[0].path: stored nothing, now 'v'"),
    ("data.seed", 5, "data.seed: stored None, now 5"),
    ("train.seed", 2, "train.seed: stored 1, now 2"),
    ("batch.global", 16, "batch.global: stored 8, now 16"),
    ("data.document_mask", True, "data.document_mask: stored False, now True"),
    ("data.reset_positions", True, "data.reset_positions: stored False, now True"),
    ("train.z_loss", 1e-4, "train.z_loss: stored 0.0, now 0.0001"),  # from a checkpoint that is older than the setting
    ("tokenizer.type", "bytes", "tokenizer.type: stored 'huggingface', now 'bytes'"),
    ("tokenizer.eod", "<eod>", "tokenizer.eod: stored '<eos>', now '<eod>'"),
])
def test_what_shapes_the_numbers_is_compared(path, value, line):
    assert line in [str(difference) for difference in differences(CONFIG, changed(path, value))]


@pytest.mark.parametrize("path, value", [
    ("model.vocab_multiple", 64), ("data.cache", "/elsewhere"), ("parallel.tp", 4), ("train.steps", 20), ("batch.micro", 16),
    ("schedule.decay", "wsd"), ("train.label_smoothing", 0.0), ("data.document_mask", False),
    ("tokenizer.path", "elsewhere/t.json")])
def test_what_doesn_t_is_free(path, value):
    assert differences(CONFIG, changed(path, value)) == []


def test_all_differences_come_at_once():
    config = changed("optimizer.lr", 0.2)
    config["train"]["seed"] = 9
    config["model"]["hidden_size"] = 128
    assert [difference.path for difference in differences(CONFIG, config)] == ["model.hidden_size", "optimizer.lr", "train.seed"]


def test_tuples_and_lists_are_the_same_json():
    config = copy.deepcopy(CONFIG)
    config["optimizer"]["betas"] = (0.9, 0.95)
    config["data"]["valid"] = ()
    assert differences(CONFIG, config) == []


def test_flatten_names_leaves_by_their_paths():
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": [], "e": {}}) == {"a.b[0]": 1, "a.b[1].c": 2, "d": [], "e": {}}


@pytest.fixture
def run(tmp_path):
    succeed(save_all(tmp_path, 4, engines(SMALL, draw(SMALL))))
    return tmp_path


def test_the_error_lists_every_difference(run):
    path = choose(run, "auto")
    assert path.name == "step_00000004"
    assert check_resume(path, settings(), plan()) == []
    other = settings(train={"seed": 2}, optimizer={"lr": 0.3})
    with pytest.raises(CheckpointError) as caught:
        check_resume(path, other, plan())
    assert "checkpoint.allow_changes=true" in str(caught.value)
    assert str(caught.value).splitlines()[1:] == ["  train.seed: stored 1, now 2", "  optimizer.lr: stored 0.1, now 0.3"]
    allowed = settings(allow_changes=True, train={"seed": 2})
    assert [difference.path for difference in check_resume(path, allowed, plan())] == ["train.seed"]


def test_a_vocabulary_of_another_size_is_another_model_whoever_states_it(run):
    path = choose(run, "auto")
    assert check_resume(path, settings(model={"hidden_size": 12, "vocab_size": 60}), plan()) == []
    with pytest.raises(CheckpointError, match="the vocabulary's size: stored 60, now 61"):
        check_resume(path, settings(), plan(vocab_size=61))


def test_weights_begin_a_run_of_their_own_model_and_vocabulary_only(tmp_path):
    """Whatever has the same shapes and means something else is named; what trains it is the new run's business."""
    spm, other = tmp_path / "spm.model", tmp_path / "other.model"
    spm.write_bytes(b"pieces")
    other.write_bytes(b"others")
    succeed(save_all(tmp_path, 4, engines(SMALL, draw(SMALL)), tokenizer_files=[spm]))
    path = choose(tmp_path, "auto")
    free = {"model": {"hidden_size": 12, "dropout": 0.1, "vocab_size": 60}, "train": {"seed": 9}, "optimizer": {"lr": 3.0}}
    assert check_start(path, settings(**free), plan(), [spm]) == []
    changes = settings(model={"hidden_size": 12, "norm_eps": 0.1, "rotary_theta": 5.0})
    with pytest.raises(CheckpointError) as caught:
        check_start(path, changes, plan(vocab_size=61), [other])
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("checkpoint.allow_changes=true goes on regardless, as far as the weights fit:")
    assert lines[1:4] == ["  model.norm_eps: stored nothing, now 0.1", "  model.rotary_theta: stored nothing, now 5.0",
                          "  the vocabulary's size: stored 60, now 61"] and lines[4].startswith("  the tokenizer's files: ")
    assert len(check_start(path, settings(allow_changes=True, train={"seed": 9}), plan(vocab_size=61), [spm])) == 1
    (path / "tokenizer/spm.model").unlink()
    assert check_start(path, settings(), plan(), [other]) == [], "weights that came without one"


def test_a_config_that_isn_t_one(run):
    path = choose(run, "auto")
    (path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="config.json: a JSON object expected"):
        check_resume(path, settings(), plan())


def test_another_tokenizer_is_another_run_wherever_its_file_is(tmp_path):
    before, moved, other = (tmp_path / name for name in ("spm.model", "moved.model", "other.model"))
    before.write_bytes(b"pieces")
    moved.write_bytes(b"pieces")
    other.write_bytes(b"others")
    succeed(save_all(tmp_path, 4, engines(SMALL, draw(SMALL)), tokenizer_files=[before]))
    path = choose(tmp_path, "auto")
    assert check_resume(path, settings(), plan(), [moved]) == []
    for files, now in (([other], "6 bytes, sha256 "), ([], "")):
        with pytest.raises(CheckpointError, match=rf"the tokenizer's files: stored \['6 bytes, sha256 .*'\], now \['?{now}"):
            check_resume(path, settings(), plan(), files)
    assert len(check_resume(path, settings(allow_changes=True), plan(), [other])) == 1


def test_another_precision_is_told_and_not_refused(run):
    path = choose(run, "auto")
    [told] = check_resume(path, settings(precision={"dtype": "fp16"}), plan())
    assert str(told) == "precision.dtype: stored nothing, now 'fp16'"


def test_initial_weights_are_needed_only_for_rows_that_the_checkpoint_lacks(run):
    path = choose(run, "auto")
    assert replaces_all(path, plan()) and replaces_all(path, plan(padded_vocab_size=32))
    assert not replaces_all(path, plan(padded_vocab_size=65))


def test_never_refuses_a_folder_with_a_run_in_it(run, tmp_path_factory):
    with pytest.raises(CheckpointError, match='checkpoint.resume "never" needs an empty train.dir; .* has checkpoints'):
        choose(run, "never")
    empty = tmp_path_factory.mktemp("new")
    assert choose(empty, "never") is None and choose(empty / "not there yet", "never") is None
    (empty / "logs").mkdir()
    assert choose(empty, "never") is None, "the launcher's logs are no run"
    (empty / "metrics.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has metrics.jsonl: use another"):
        choose(empty, "never")


def test_auto_starts_anew_only_where_there_is_nothing(run, tmp_path_factory):
    assert choose(tmp_path_factory.mktemp("empty"), "auto") is None
    (run / "checkpoints/step_00000004/plan.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint; skipped step_00000004: plan.json is missing"):
        choose(run, "auto")
