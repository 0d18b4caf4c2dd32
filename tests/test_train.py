"""The whole path: configuration, ranks, data, engine, checkpoints and metrics together."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from megalm.checkpoint import find, read_manifest
from megalm.data import IndexedWriter
from megalm.parallel.stop import PREEMPTED
from tests import dist, training
from tests.checkpoint.fakes import plant

LAYOUTS = {
    "tp2-pp2-bf16": (4, {"parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}, "precision": {"dtype": "bf16"}}),
    "tp2-dp2-zero3": (4, {"parallel": {"tp": 2, "dp": 2, "sequence_parallel": True, "zero_stage": 3}}),
    "one-zero0": (1, {"parallel": {"zero_stage": 0}}),
    "pp2-dp2": (4, {"parallel": {"pp": 2, "dp": 2}}),
    "dp2-zero2-bf16": (2, {"parallel": {"dp": 2, "zero_stage": 2}, "precision": {"dtype": "bf16"}}),
    "dp2-zero3-bf16": (2, {"parallel": {"dp": 2, "zero_stage": 3}, "precision": {"dtype": "bf16"}}),
    "pp2-sgd": (2, {"parallel": {"pp": 2}, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip_grad_norm": 0.5}}),
    "tp2-pp2-documents": (4, {"parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}, "recompute": {"mode": "full"},
                              "model": {"attention_dropout": 0.0, "position_embedding": "learned"},
                              "data": {"document_mask": True, "reset_positions": True}}),
    "one-zero0-sgd": (1, {"parallel": {"zero_stage": 0}, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_bitwise_equal(layout, tmp_path):
    """Six steps at once, or three, a stop, and three more, with dropout, clipping and a skipped step on the way."""
    world, sections = LAYOUTS[layout]
    whole = training.write_config(tmp_path, **sections)
    assert training.start(world, whole, poisoned=(1,)) == [(0, "")] * world
    halves = tmp_path / "halves"
    folder = f"train.dir={json.dumps(str(halves))}"
    assert training.start(world, whole, folder, "train.stop_at=3", poisoned=(1,)) == [(0, "")] * world
    assert [record["step"] for record in training.records(halves)] == [1, 2, 3]
    assert training.start(world, whole, folder, poisoned=(1,)) == [(0, "")] * world
    expected, found = training.records(tmp_path / "run"), training.records(halves)
    assert expected == found
    assert [record.get("skipped", False) for record in expected] == [False, True, False, False, False, False]
    one, two = training.tensors(find(tmp_path / "run")), training.tensors(find(halves))
    assert one.keys() == two.keys() and len(one) > 0
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = read_manifest(find(tmp_path / "run")), read_manifest(find(halves))
    assert one["counters"] == two["counters"] and one["consumed_samples"] == two["consumed_samples"] == 48
    assert one["counters"]["optimizer_step"] == (0 if "sgd" in layout else 5) and one["counters"]["skipped_steps"] == 1


def test_resume_under_another_layout(tmp_path):
    """A run that changes its layout three times, and how many micro-batches a step has: with dropout, weights and optimizer state
    move, and fp32 losses are those of the run that never moved, to rounding."""
    path = training.write_config(tmp_path, batch={"micro": 2, "global": 12})
    training.start(1, path)
    moved = f"train.dir={json.dumps(str(tmp_path / 'moved'))}"
    for world, *overrides in (
            (4, "train.stop_at=1", "parallel.tp=2", "parallel.dp=2", "parallel.sequence_parallel=true"),  # 3 micro-batches
            (1, "train.stop_at=3", "batch.micro=3", "parallel.zero_stage=0"),  # 4, of which 3 aren't a multiple
            (4, "train.stop_at=4", "parallel.tp=2", "parallel.pp=2", "batch.micro=1"),
            (2, "parallel.dp=2", "parallel.zero_stage=3", "model.vocab_multiple=512")):
        assert training.start(world, path, moved, *overrides) == [(0, "")] * world
    expected, found = training.records(tmp_path / "run"), training.records(tmp_path / "moved")
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_documents_reach_every_stage(tmp_path):
    """The middle one of three stages reads no token, only the index: training and evaluation are those of one rank."""
    sections = {"model": {"num_layers": 3}, "train": {"steps": 2, "eval_every": 2}}
    path = training.write_config(tmp_path, **sections)
    found = {}
    for name, world, overrides in (("one", 1, ["document_mask=true"]), ("stages", 3, ["document_mask=true", "parallel.pp=3"]),
                                   ("off", 1, [])):
        overrides = [key if "." in key else f"data.{key}" for key in overrides]
        folder = f"train.dir={json.dumps(str(tmp_path / name))}"
        assert training.start(world, path, folder, *overrides) == [(0, "")] * world
        found[name] = [value for record in training.records(tmp_path / name) for key, value in record.items() if "loss" in key]
    assert len(found["one"]) == 3 and found["stages"] == pytest.approx(found["one"], rel=1e-5)
    assert found["off"] != pytest.approx(found["one"], rel=1e-4)
    # Going on with another mask is another run.
    [(code, said)] = training.start(1, path, f"train.dir={json.dumps(str(tmp_path / 'one'))}", "train.steps=3")
    assert code == 2 and "data.document_mask: stored True, now False" in said


@pytest.mark.parametrize("world, overrides", [(1, ["parallel.zero_stage=0"]), (4, ["parallel.tp=2", "parallel.pp=2"])], ids=str)
def test_a_damaged_checkpoint_is_skipped_and_the_run_goes_on_bitwise(world, overrides, tmp_path):
    """A bit of a moment flips in the newest; one rank finds it, all of them take the one before, and say why."""
    path = training.write_config(tmp_path, checkpoint={"every": 2, "keep": 9})
    assert training.start(world, path, *overrides) == [(0, "")] * world
    expected = training.tensors(find(tmp_path / "run"))
    root = tmp_path / "run/checkpoints"
    shutil.rmtree(root / "step_00000006")
    last = sorted((root / "step_00000004").glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-3] ^= 16
    last.write_bytes(content)
    notes = dist.run(_notes, world, str(path), overrides)[0]
    [skipped] = [note for note in notes if note.startswith("skipped ")]
    assert skipped.startswith("skipped step_00000004: ") and f"{last.name}: " in skipped and "aren't what was written" in skipped
    assert [note for note in notes if "going on" in note] == [f"going on from step 2, {root / 'step_00000002'}"]
    found = training.tensors(find(tmp_path / "run"))
    assert find(tmp_path / "run").name == "step_00000006" and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def note_samples(engine, context, folder):
    """Write down what each step of this rank reads."""
    run = engine.train_step

    def step(number, batches):
        with (folder / f"{engine.groups.rank}").open("a") as file:
            file.write(f"{number} {torch.cat([batch.samples for batch in batches]).tolist()}\n")
        return run(number, batches)

    engine.train_step = step


def test_another_global_batch_goes_on_where_the_data_was(tmp_path):
    """Steps 1 to 3 draw eight samples each; from then on, by permission, four, then twelve: none twice, none left out."""
    path = training.write_config(tmp_path, checkpoint={"allow_changes": True})
    note = (functools.partial(note_samples, folder=tmp_path),)
    assert training.start(1, path, "train.stop_at=3", changes=note) == [(0, "")]
    assert read_manifest(find(tmp_path / "run"))["consumed_samples"] == 24
    assert training.start(1, path, "batch.global=4", "train.stop_at=5", changes=note) == [(0, "")]
    assert read_manifest(find(tmp_path / "run"))["consumed_samples"] == 32
    assert training.start(2, path, "batch.global=12", "parallel.dp=2", changes=note) == [(0, "")] * 2
    assert read_manifest(find(tmp_path / "run"))["consumed_samples"] == 44
    drawn = [[] for _ in range(6)]
    for rank in ("0", "1"):
        for line in (tmp_path / rank).read_text().splitlines():
            step, _, samples = line.partition(" ")
            drawn[int(step)] += json.loads(samples)
    ends = [0, 8, 16, 24, 28, 32, 44]
    assert [sorted(samples) for samples in drawn] == [list(range(*pair)) for pair in itertools.pairwise(ends)]
    assert [record["tokens"] for record in training.records(tmp_path / "run")] == [16 * end for end in ends[1:]]


def _without_initial_weights(rank: int, world: int, path: str, overrides: list[str]) -> tuple[int, str]:
    from megalm.model import gpt

    def initialise(module, seed):
        raise AssertionError("initial weights that nobody will see")

    gpt.initialise = initialise
    return training.run_rank(rank, world, path, overrides)


def test_a_resumed_run_computes_no_initial_weights_unless_it_has_more_rows(tmp_path):
    path = training.write_config(tmp_path)
    training.start(2, path, "parallel.pp=2", "train.stop_at=2")
    first = find(tmp_path / "run")
    assert dist.run(_without_initial_weights, 2, str(path), ["parallel.pp=2", "train.stop_at=3"]) == [(0, "")] * 2
    other = [f"checkpoint.init_from={json.dumps(str(first))}", f"train.dir={json.dumps(str(tmp_path / 'other'))}"]
    other += ["train.stop_at=1", "model.vocab_multiple=64"]
    assert dist.run(_without_initial_weights, 1, str(path), other) == [(0, "")]
    assert training.start(1, path, "model.vocab_multiple=512", "train.stop_at=4") == [(0, "")]  # 384 rows become 512
    kept = training.tensors(find(tmp_path / "run"))
    assert all(torch.isfinite(value).all() for value in kept.values())


@pytest.mark.parametrize("changes", [["precision.dtype=fp32", "parallel.zero_stage=0"], ["precision.dtype=bf16"]], ids=str)
def test_an_fp16_run_goes_on_in_another_precision(changes, tmp_path):
    """An fp16 run's loss scale, planted in a checkpoint since a CPU has no fp16, is left alone; the change is told."""
    path = training.write_config(tmp_path)
    training.start(1, path, "train.stop_at=2")
    folder = find(tmp_path / "run")
    plant(folder, "config.json", lambda config: config["precision"].update(dtype="fp16"))
    scale = {"cur_scale": 8.0, "cur_iter": 2, "last_overflow_iter": 1, "cur_hysteresis": 2}
    plant(folder, "checkpoint.json", lambda manifest: manifest["counters"].update(loss_scaler=scale))
    (notes,) = dist.run(_notes, 1, str(path), [*changes, "train.stop_at=3"])
    assert f"changed: precision.dtype: stored 'fp16', now '{changes[0][-4:]}'" in notes
    assert "loss_scaler" not in read_manifest(find(tmp_path / "run"))["counters"]
    first, last = ([note for note in notes if note.startswith(start)] for start in ("data: ", "data until step 3: "))
    assert len(first) == len(last) > 0 and all(note.endswith(" epochs") for note in first + last)


def _notes(rank: int, world: int, path: str, overrides: list[str]) -> list[str]:
    """What the run tells its user."""
    from megalm import train
    from megalm.metrics import Logger

    told, note = [], Logger.note
    Logger.note = lambda self, text: (told.append(text), note(self, text))[1]
    train._tell = told.append
    assert training.run_rank(rank, world, path, overrides) == (0, "")
    return told


def test_finished_run_says_so_and_changes_nothing(tmp_path):
    path = training.write_config(tmp_path)
    training.start(1, path)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    newest = find(tmp_path / "run")
    assert training.start(1, path) == [(0, "")]
    assert (tmp_path / "run/metrics.jsonl").read_text() == before and find(tmp_path / "run") == newest


def test_a_finished_run_with_other_settings_is_no_finished_run(tmp_path):
    path = training.write_config(tmp_path, train={"dir": str(tmp_path / "run"), "steps": 1})
    training.start(1, path)
    code, said = training.start(1, path, "optimizer.lr=0.5")[0]
    assert code == 2 and "optimizer.lr" in said


def test_stop_at_holds_when_the_same_command_comes_again(tmp_path):
    path = training.write_config(tmp_path)
    for _ in range(2):
        assert training.start(1, path, "train.stop_at=2") == [(0, "")]
        assert [record["step"] for record in training.records(tmp_path / "run")] == [1, 2]
    assert training.start(1, path, "train.stop_at=1") == [(0, "")]
    assert [record["step"] for record in training.records(tmp_path / "run")] == [1, 2]


def test_metrics_beyond_the_resumed_step_are_kept_apart(tmp_path):
    path = training.write_config(tmp_path, checkpoint={"every": 2})
    training.start(1, path)
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08d}")
    training.start(1, path, "train.stop_at=3")
    assert [record["step"] for record in training.records(tmp_path / "run")] == [1, 2, 3]
    old = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl.old").read_text().splitlines()]
    assert old == [3, 4, 5, 6]


def test_evaluation_is_the_token_mean_of_every_layout(tmp_path):
    losses = []
    for world, *overrides in ((1,), (4, "parallel.tp=2", "parallel.pp=2"), (2, "parallel.dp=2", "batch.micro=1")):
        folder = tmp_path / str(len(losses))
        path = training.write_config(tmp_path, train={"dir": str(folder), "eval_every": 3, "eval_samples": 13})
        training.start(world, path, *overrides)
        losses.append([record["eval_loss"] for record in training.records(folder) if "eval_loss" in record])
    assert len(losses[0]) == 2  # 13 samples don't fill the last step of 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def ask_to_stop(engine, context, during: str) -> None:
    """The cluster asks one of the ranks to stop in the middle of step 2, or of the evaluation after it."""
    original, last, done = getattr(engine, during), engine.groups.rank == engine.groups.world_size - 1, itertools.count(1)

    def work(*arguments):
        call = next(done)
        if last and call == (2 if during == "train_step" else 4):  # the second evaluation's first of three
            os.kill(os.getpid(), signal.SIGTERM)
        assert during == "train_step" or call <= 4, "an evaluation goes on though the cluster waits"
        return original(*arguments)

    setattr(engine, during, work)


@pytest.mark.parametrize("during", ["train_step", "evaluate"])
def test_who_asks_for_a_stop_waits_for_no_evaluation(during, tmp_path):
    path = training.write_config(tmp_path, train={"dir": str(tmp_path / "run"), "steps": 6, "eval_every": 1, "eval_samples": 24})
    changes = (functools.partial(ask_to_stop, during=during),)
    assert training.start(2, path, "parallel.dp=2", changes=changes) == [(PREEMPTED, "")] * 2
    assert [record["step"] for record in training.records(tmp_path / "run") if "eval_loss" in record] == [1]
    manifest = read_manifest(find(tmp_path / "run"))
    assert manifest["step"] == 2 and manifest["eval_loss"] is None


@pytest.mark.parametrize("layout", ["one-zero0", "tp2-pp2-bf16"])
def test_bad_steps_in_a_row_stop_the_run(layout, tmp_path):
    world, sections = LAYOUTS[layout]
    sections = {**sections, "train": {"dir": str(tmp_path / "run"), "steps": 20, "max_bad_steps": 3}, "checkpoint": {"every": 1}}
    path = training.write_config(tmp_path, **sections)
    assert [code for code, _ in training.start(world, path, poisoned=(2, 4, 5, 6))] == [1] * world
    logged = training.records(tmp_path / "run")
    assert [record["step"] for record in logged if record.get("skipped")] == [3, 5, 6, 7] and logged[-1]["step"] == 7
    kept = training.tensors(find(tmp_path / "run"))
    assert all(torch.isfinite(value).all() for value in kept.values())


def break_down(engine, context):
    """The last rank meets an error that nobody has foreseen."""
    if engine.groups.rank == engine.groups.world_size - 1:
        engine.train_step = None


def test_an_error_of_any_rank_is_in_exit_code(tmp_path):
    path = training.write_config(tmp_path, parallel={"pp": 2})
    training.start(2, path, "train.stop_at=1")
    assert (tmp_path / "run/exit_code").read_text() == "0\n"
    with pytest.raises(dist.RankFailed, match="'NoneType' object is not callable"):
        training.start(2, path, changes=(break_down,))
    assert (tmp_path / "run/exit_code").read_text() == "1\n"


def spoil_loss(engine, context):
    """The third step's loss is NaN on every rank although its gradients are finite."""
    run = engine.driver.train
    engine.driver.train = lambda step, *more: run(step, *more) * (float("nan") if step == 2 else 1.0)


def trust_gradients(engine, context):
    """DeepSpeed doesn't look whether a gradient is finite, as with bf16.check_grad_overflow = false."""
    engine.deepspeed.optimizer.check_grad_overflow = False


@pytest.mark.parametrize("layout, changes, poisoned", [
    ("one-zero0", (spoil_loss,), ()), ("tp2-pp2-bf16", (spoil_loss,), ()), ("dp2-zero2-bf16", (trust_gradients,), (2,))])
def test_a_bad_step_that_reached_the_weights_ends_the_run_at_once(layout, changes, poisoned, tmp_path):
    world, sections = LAYOUTS[layout]
    path = training.write_config(tmp_path, **sections, checkpoint={"every": 1})
    for code, said in training.start(world, path, changes=changes, poisoned=poisoned):
        assert code == 1 and said == ("error: stopped: step 3 changed the weights with a loss or gradients that are not finite; "
                                      "the newest checkpoint is that of step 2\n")
    assert [record["step"] for record in training.records(tmp_path / "run")] == [1, 2, 3]
    assert find(tmp_path / "run").name == "step_00000002"
    kept = training.tensors(find(tmp_path / "run"))
    assert all(torch.isfinite(value).all() for value in kept.values())


def _differing(rank: int, world: int, path: str, overrides: list[str]) -> tuple[int, str]:
    return training.run_rank(rank, world, path, overrides if rank == 1 else [])


@pytest.mark.parametrize(("overrides", "words"), [
    (["train.seed=5"], "config train.seed: 1234 on rank 0, 5 on rank 1"),
    (["parallel.dp=1", "parallel.pp=2"], "config parallel.pp: 1 on rank 0, 2 on rank 1"),
], ids=["seed", "layout"])
def test_ranks_with_different_configs_name_the_difference(overrides, words, tmp_path):
    path = training.write_config(tmp_path, parallel={"dp": 2})
    for code, said in dist.run(_differing, 2, str(path), overrides):
        assert code == 2 and words in said


@pytest.mark.parametrize(("world", "overrides", "words"), [
    (1, ["data.train=[{\"path\": \"/nowhere/x\"}]"], "/nowhere/x"),
    (2, ["parallel.dp=auto", "parallel.tp=4"], "4"),
    (1, ["model.vocab_size=200"], "200 is smaller than the tokenizer's vocabulary of 257"),
    (2, ["parallel.dp=2", "batch.global=9"], "batch.global"),
    (1, ["model.hiden_size=3"], "model.hidden_size"),
    (1, ["kernels.attention=flash_attn"], "flash_attn"),
    (1, ["precision.dtype=fp16"], "precision.dtype"),
    (1, ["optimizer.impl=apex"], "optimizer.impl"),
    (1, ["checkpoint.init_from=/nowhere"], "/nowhere"),
    (2, ["parallel.dp=2", "deepspeed.zero_optimization.overlap_com=true"], "mean deepspeed.zero_optimization.overlap_comm?"),
    (1, ["deepspeed.zero_optimization.allgather_bucket_size=big"], "deepspeed.zero_optimization.allgather_bucket_size: input"),
    (1, ["deepspeed.zero_optimization.offload_optimizer.device=cpu"], "megalm doesn't offload yet"),
    (1, ["deepspeed.comms_loger={}"], "deepspeed.comms_loger: unknown key (value {}); did you mean deepspeed.comms_logger?"),
], ids=["missing data", "world", "vocabulary", "batch", "unknown key", "kernel", "fp16", "apex", "init_from", "DeepSpeed's key",
        "DeepSpeed's value", "offload", "DeepSpeed's section"])
def test_a_users_mistake_is_a_line_and_exit_2(world, overrides, words, tmp_path):
    path = training.write_config(tmp_path)
    for code, said in training.start(world, path, *overrides):
        assert code == 2 and said.startswith("error: ") and words in said and "Traceback" not in said, said


def test_ids_that_the_tokenizer_has_not_are_refused_though_the_model_has_room(tmp_path):
    """A data set of another tokenizer, under a model.vocab_size that is large enough for both."""
    with IndexedWriter(tmp_path / "other", np.uint16) as writer:
        for _ in range(40):
            writer.add_document(np.arange(250, 300, dtype=np.uint16))
    path = training.write_config(tmp_path, model={"vocab_size": 512}, data={"train": [{"path": str(tmp_path / "other")}]})
    for code, said in training.start(1, path):
        assert code == 2 and "has 257 entries: the data set was made with another tokenizer" in said and "Traceback" not in said


def _full_disk(rank: int, world: int, path: str, name: str) -> tuple[int, str]:
    """run_rank on a machine whose file system has no room for the run's file `name`."""
    write = Path.write_text

    def write_text(self: Path, *arguments, **keywords) -> int:
        if self.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, *arguments, **keywords)

    Path.write_text = write_text
    return training.run_rank(rank, world, path, [])


@pytest.mark.parametrize("name", ["config.part", "plan.part"])
def test_a_disk_that_is_full_from_the_start_is_a_line_on_every_rank(name, tmp_path):
    path = training.write_config(tmp_path, parallel={"tp": 2})
    for code, said in dist.run(_full_disk, 2, str(path), name, timeout=60):
        assert code == 2 and said.count("\n") == 1 and f"No space left on device: '{tmp_path}/run/{name}'" in said, said


def test_changed_seed_is_refused_unless_allowed(tmp_path):
    path = training.write_config(tmp_path)
    training.start(1, path, "train.stop_at=2")
    code, said = training.start(1, path, "train.seed=99", "optimizer.lr=0.1", "batch.global=4")[0]
    assert code == 2 and all(key in said for key in ("train.seed", "optimizer.lr", "batch.global"))
    assert (tmp_path / "run/exit_code").read_text() == "2\n"
    assert training.start(1, path, "train.seed=99", "checkpoint.allow_changes=true")[0][0] == 0
    code, said = training.start(1, path, "checkpoint.resume=never")[0]
    assert code == 2 and "checkpoint.resume" in said
