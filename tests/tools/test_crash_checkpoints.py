"""Crashes while a checkpoint is saved: a quick subset of the tool, and that it would find what it looks for."""
from __future__ import annotations

import os
import random
import re

import pytest

from megalm.checkpoint import Saver, jobs, publish
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import step_name
from megalm.tools._crash_scene import CASES, Scene
from megalm.tools._crew import Groups
from megalm.tools.crash_checkpoints import attempts, main


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind, count", [("deaths", 20), ("errors", 25), ("power", 30), ("kills", 5)])
def test_no_checkpoint_is_lost_or_torn(kind, count, ranks, tmp_path):
    tried = list(attempts(tmp_path, count, kind, ranks, seed=1))
    assert len(tried) == count and not any(tried), list(filter(None, tried))


def no_sync_of_files(monkeypatch):
    def write(self, path, chunks):
        handle = self.create(path)
        size = sum(self.append(handle, chunk) for chunk in chunks)
        os.close(handle)
        return size

    monkeypatch.setattr(Disk, "write", write)


def no_sync_of_the_folder(monkeypatch):
    original = Disk.sync_folder
    monkeypatch.setattr(Disk, "sync_folder", lambda self, path: path.name.startswith(".tmp_") or original(self, path))


def the_old_one_goes_first(monkeypatch):
    def publish_late(root, temporary, step, disk):
        for path in root.glob("step_*"):
            disk.remove(path)
        publish.publish(root, temporary, step, disk)

    monkeypatch.setattr(jobs, "publish", publish_late)


def it_has_its_name_before_it_is_described(monkeypatch):
    def describe(temporary, manifest, documents, tokenizer_files, disk):
        final = temporary.with_name(step_name(manifest["step"]))
        publish.replace(final, temporary, disk)
        publish.describe_whole(final, manifest, documents, tokenizer_files, disk)
        disk.rename(final, temporary)

    monkeypatch.setattr(jobs, "describe_whole", describe)


def the_second_rank_answers_before_it_syncs(monkeypatch):
    def write_part(folder, rank, entries, content, disk):
        if rank:
            disk.sync = lambda handle: None
        original(folder, rank, entries, content, disk)

    original = jobs.write_part
    monkeypatch.setattr(jobs, "write_part", write_part)


def rank_0_doesn_t_wait_for_the_others(monkeypatch):
    def begin(saver):
        original(saver)
        if saver._groups.rank == 0:
            saver._performer.whole(folder=saver._folder, manifest=saver._manifest, **saver._whole)

    original = Saver._begin
    monkeypatch.setattr(Saver, "_begin", begin)


def rank_0_goes_on_though_another_has_failed(monkeypatch):
    monkeypatch.setattr(Saver, "_agree", lambda saver: saver._groups.agree(None))


def nobody_waits_until_rank_0_has_cleaned(monkeypatch):
    def begin(saver, folder, engine, groups, *more, **named):
        hasty = Groups(groups.rank, groups.crew)
        hasty.agree = lambda problem: []
        original(saver, folder, engine, hasty, *more, **named)
        saver._groups = groups

    original = Saver.__init__
    monkeypatch.setattr(Saver, "__init__", begin)


@pytest.mark.parametrize("mistake, kind, ranks", [
    (no_sync_of_files, "power", 1), (no_sync_of_the_folder, "power", 1), (the_old_one_goes_first, "power", 1),
    (the_old_one_goes_first, "deaths", 1), (it_has_its_name_before_it_is_described, "deaths", 1),
    (no_sync_of_files, "power", 2), (no_sync_of_the_folder, "power", 2), (it_has_its_name_before_it_is_described, "deaths", 2),
    (the_second_rank_answers_before_it_syncs, "power", 2), (rank_0_doesn_t_wait_for_the_others, "power", 2),
    (rank_0_goes_on_though_another_has_failed, "errors", 2), (nobody_waits_until_rank_0_has_cleaned, "deaths", 2)])
def test_a_mistake_in_the_order_of_things_is_found(mistake, kind, ranks, tmp_path, monkeypatch):
    mistake(monkeypatch)
    assert next(filter(None, attempts(tmp_path, 150, kind, ranks)), None) is not None


def test_it_says_how_much_of_what_is_possible_was_tried(capsys):
    assert main(["--trials", "1", "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^2 ranks, deaths +5 trials of [1-9]\d\d possible, 0 with", said, re.MULTILINE)
    assert re.search(r"^2 ranks, power +5 trials, 0 with", said, re.MULTILINE)


def test_a_seed_repeats_who_did_what_in_which_order(tmp_path):
    orders = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        scene = Scene(CASES[1], 2, tmp_path / str(number), random.Random(seed))
        orders.append([(rank, name) for rank, name, *_ in scene.journal()])
    assert orders[0] == orders[1] != orders[2] and {rank for rank, _ in orders[2]} == {0, 1}
