"""Crashes while a checkpoint is saved: a quick subset of the tool, and that it would find what it looks for."""
from __future__ import annotations

import os
import re

import pytest

from megalm.checkpoint import jobs, publish
from megalm.checkpoint.disk import Disk
from megalm.tools.crash_checkpoints import main, trials


@pytest.mark.parametrize("kind, count", [("deaths", 200), ("errors", 160), ("power", 160), ("kills", 80)])
def test_no_checkpoint_is_lost_or_torn(kind, count, tmp_path):
    [(done, wrong)] = trials(tmp_path, count, seed=1, kinds=[kind]).values()
    assert wrong == [] and done >= 4


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


@pytest.mark.parametrize("mistake, kind", [(no_sync_of_files, "power"), (no_sync_of_the_folder, "power"),
                                           (the_old_one_goes_first, "power"), (the_old_one_goes_first, "deaths")])
def test_a_mistake_in_the_order_of_things_is_found(mistake, kind, tmp_path, monkeypatch):
    mistake(monkeypatch)
    [(_, wrong)] = trials(tmp_path, 160, kinds=[kind]).values()
    assert wrong != []


def test_it_says_how_much_of_what_is_possible_was_tried(capsys):
    assert main(["--trials", "20"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^deaths +4 trials of [1-9]\d\d possible, 0 with", said, re.MULTILINE)
    assert re.search(r"^power +8 trials, 0 with", said, re.MULTILINE)
