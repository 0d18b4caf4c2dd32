"""checkpoint.remote on an S3 server: parts of large files, a process killed among them, errors of the server, no way in."""
from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable

import fsspec
import pytest
import s3fs

from megalm.checkpoint import CheckpointError, attempts, fetch_missing
from megalm.checkpoint.fetch import fetch
from megalm.checkpoint.jobs import Answer, Performer
from megalm.checkpoint.remote import Remote
from megalm.checkpoint.uploads import Uploads
from tests import dist, training
from tests.checkpoint import cloud
from tests.checkpoint.disks import tree
from tests.checkpoint.fakes import SMALL, Crew, Hasty, draw, engines, save_all
from tests.checkpoint.test_layouts import succeed

pytest_plugins = ["tests.checkpoint.storages"]
PART_BYTES = 5 << 20
"""The least that S3 takes, and moto too, of any part but the last."""
LARGE = {"embedding.word.weight": ((1000, 1000), 0)}
PARTS = {"FSSPEC_S3": json.dumps({"default_block_size": PART_BYTES})}
WAIT_SECONDS = 30.0
LOST = "(EndpointConnection|ConnectionClosed)Error: "
"""What the package says of a connection that ends, depending on when."""


def in_the_cloud(rank: int, world: int, environment: dict[str, str], *arguments) -> tuple[int, str]:
    """training.run_rank with these variables, and no other for S3: the server that ranks are forked from may have some."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(environment)
    return training.run_rank(rank, world, *arguments)


def train(world: int, environment: dict[str, str], path, *overrides: str) -> list[tuple[int, str]]:
    return dist.run(in_the_cloud, world, environment, str(path), list(overrides), timeout=120)


def losses(folder) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in training.records(folder) if "loss" in record}


def objects(bucket: str) -> list[str]:
    """The keys of the bucket's objects."""
    return sorted(name.removeprefix(f"{bucket}/") for name in fsspec.filesystem("s3").find(bucket))


def unfinished(bucket: str) -> list[str]:
    """The keys of the uploads in parts that nobody has ended."""
    return [upload["Key"] for upload in fsspec.filesystem("s3").list_multipart_uploads(bucket)]


def test_a_run_goes_on_from_s3_in_an_empty_folder_under_another_layout(server, bucket, tmp_path):
    """Large files went there in parts; the newest is damaged there, so it is the one before; the losses are those of the run
    that was not disturbed."""
    path = training.write_config(tmp_path, model={"vocab_size": 30000, "tie_embeddings": False},
                                 train={"steps": 4}, checkpoint={"every": 3, "keep": 2, "remote": f"s3://{bucket}/run"})
    environment = cloud.environment(server.endpoint) | PARTS
    assert train(2, environment, path, "parallel.tp=2") == [(0, "")] * 2
    counts, expected = server.counts(), losses(tmp_path / "run")
    size = (tmp_path / "run/checkpoints/step_00000004/rank_00000.safetensors").stat().st_size
    files = 2 * 2  # steps, ranks
    assert counts["CreateMultipartUpload"] == counts["CompleteMultipartUpload"] == files
    assert counts["UploadPart"] == files * -(-size // PART_BYTES) >= files * 3 and unfinished(bucket) == []
    kept = {name.split("/")[1] for name in objects(bucket)}
    assert kept == {"latest", "step_00000003", "step_00000004"}, "as many as checkpoint.keep"

    name = f"{bucket}/run/step_00000004/rank_00001.safetensors"
    content = bytearray(fsspec.filesystem("s3").cat_file(name))
    content[len(content) // 2] ^= 1
    fsspec.filesystem("s3").pipe_file(name, bytes(content))
    shutil.rmtree(tmp_path / "run")
    assert train(2, environment, path, "parallel.pp=2") == [(0, "")] * 2
    found = losses(tmp_path / "run")
    assert found.keys() == {4} and all(abs(found[step] - expected[step]) < 1e-5 for step in found)
    fetched = fetch(Remote(f"s3://{bucket}/run"), tmp_path / "again/checkpoints", print)
    assert fetched.name == "step_00000004", "the damaged one has been replaced"


def large(folder, url: str) -> Performer:
    """Step 1, which is small, is copied; step 2, of 12 MB, is only here."""
    succeed(save_all(folder, 1, engines(SMALL, draw(SMALL))))
    succeed(save_all(folder, 2, engines(LARGE, draw(LARGE))))
    performer = Performer(folder / "checkpoints", Hasty())
    assert [answer.problem for answer in copy(performer, url, 1)] == [None] * 3
    return performer


def copy(performer: Performer, url: str, step: int) -> list[Answer]:
    """As one rank has it done: what comes after a problem isn't tried."""
    jobs = (lambda: performer.withdraw(url, step), lambda: performer.upload(url, step, 0, 1),
            lambda: performer.complete(url, step, {"keep": 3}))
    answers: list[Answer] = []
    for job in jobs:
        answers.append(job())
        if answers[-1].problem:
            break
    return answers


def copied(folder, url: str, step: int, meanwhile: Callable[[Uploads], None] = lambda copies: None) -> list[str]:
    """Copy a step as a run of one rank does; the lines that it tells."""
    lines: list[str] = []

    def job(groups):
        copies = Uploads(folder / "checkpoints", groups, url, {"keep": 3}, lines.append)
        copies.offer(step)
        meanwhile(copies)
        copies.finish()
        copies.close()

    succeed(Crew(1).run(job))
    return lines


def test_a_process_killed_among_the_parts_leaves_none_and_the_next_run_ends_the_copy(server, bucket, tmp_path, monkeypatch):
    url, run = f"s3://{bucket}/run", tmp_path / "run"
    large(run, url)
    cloud.use(monkeypatch, cloud.environment(server.endpoint) | PARTS)
    trouble = server.trouble("UploadPart", "hold", times=9, after=1)

    def kill(copies: Uploads) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not trouble.met.is_set():
            assert time.monotonic() < deadline
            copies.progress(copies.state)
            time.sleep(0.05)
        os.kill(copies._process.pid, signal.SIGKILL)

    [line] = copied(run, url, 2, kill)
    server.calm()
    assert line.startswith(f"step_00000002 isn't in {url}, only in {run}/checkpoints: rank 0 failed copying it: the process that")
    assert line.endswith("has ended: signal 9 (SIGKILL)")
    assert [name for name in objects(bucket) if "step_00000002" in name] == []
    assert unfinished(bucket) == ["run/step_00000002/rank_00000.safetensors"]
    assert fetch(Remote(url), tmp_path / "empty", print).name == "step_00000001"
    server.trouble("ListMultipartUploads", "AccessDenied")
    assert copied(run, url, 2) == [] and len(unfinished(bucket)) == 1, "who may not look for them does without"
    assert copied(run, url, 2) == [] and unfinished(bucket) == []
    found = fetch(Remote(url), tmp_path / "other", print)
    assert tree(found) == tree(run / "checkpoints/step_00000002")


@pytest.fixture
def hasty(monkeypatch):
    """No second thoughts after an error, but those under test."""
    monkeypatch.setattr(attempts, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_wherever_a_copy_is_cut_off_the_one_before_or_the_whole_one_is_there(server, bucket, tmp_path, hasty):
    """At every request of a copy: from then on nothing gets through, as when its process is killed. That one doesn't either, or
    is done and the answer lost. Each begins among what the ones before have left."""
    url, run = f"s3://{bucket}/run", tmp_path / "run"
    for step in (1, 2):
        succeed(save_all(run, step, engines(SMALL, draw(SMALL, seed=step))))
    performer, remote, found = Performer(run / "checkpoints", Hasty()), Remote(url), []
    copy(performer, url, 1)
    for cut in itertools.count():
        if cut % 2:
            server.trouble("", "lost", after=cut)
        trouble = server.trouble("", "drop", after=cut, times=10 ** 6)
        copy(performer, url, 2)
        server.calm()
        if not trouble.met.is_set():
            break
        found.append(remote.steps())
        if found[-1] == [2, 1]:
            assert tree(fetch(remote, tmp_path / str(cut), print)) == tree(performer.root / "step_00000002")
            fsspec.filesystem("s3").rm_file(f"{bucket}/run/step_00000002/checkpoint.json")
    assert found == sorted(found, key=len) and found[0] == [1] and found[-1] == [2, 1] and len(found) > 20
    assert remote.steps() == [2, 1]


@pytest.mark.parametrize("kind", ["SlowDown", "InternalError", "drop"])
def test_a_moment_s_trouble_of_the_server_costs_a_moment(server, bucket, tmp_path, hasty, kind):
    """Here it is our own patience alone; s3fs has its own too."""
    url = f"s3://{bucket}/run"
    performer = large(tmp_path / "run", url)
    server.trouble("PutObject", kind, times=2, end="rank_00000.json")
    server.trouble("PutObject", kind, end="/latest")
    assert [answer.problem for answer in copy(performer, url, 2)] == [None] * 3
    assert Remote(url).steps() == [2, 1]
    assert sum(path.endswith("2/rank_00000.json") for name, path in server.calls if name == "PutObject") == 3


@pytest.mark.parametrize(("kind", "said"), [
    ("SlowDown", "EBUSY: as told: SlowDown"), ("drop", LOST), ("AccessDenied", "PermissionError: as told: AccessDenied")])
def test_lasting_trouble_is_a_line_that_says_where_and_nothing_is_left(server, bucket, tmp_path, monkeypatch, hasty, kind, said):
    url = f"s3://{bucket}/run"
    performer = large(tmp_path / "run", url)
    files = type(fsspec.filesystem("s3"))(default_block_size=PART_BYTES)
    remote = Remote(url)
    monkeypatch.setattr(remote, "_files", files)
    monkeypatch.setattr("megalm.checkpoint.jobs.Remote", lambda _: remote)
    server.trouble("UploadPart", kind, times=99, after=1)
    problem = performer.upload(url, 2, 0, 1).problem
    assert re.match(f"copying it: {url}/step_00000002/rank_00000.safetensors: {said}", problem) and "\n" not in problem
    assert "bytes free" not in problem
    assert unfinished(bucket) == [] and server.counts()["AbortMultipartUpload"] == (1 if kind == "AccessDenied" else 3)
    assert performer.complete(url, 2, {"keep": 3}).problem.startswith(
        f"copying it: {url}/step_00000002/rank_00000.safetensors has None bytes there, not ")
    assert remote.steps() == [1]
    server.calm()
    signs: list[None] = []
    performer.moved = lambda: signs.append(None)
    assert performer.upload(url, 2, 0, 1).problem is None and len(signs) >= 3, "every part is a sign of life"


def test_no_way_in_is_one_line_before_anything_starts(server, bucket, tmp_path, monkeypatch, hasty):
    """And no bucket is made of a mistyped name."""
    lines: list[str] = []
    missing = "s3://no-such-bucket-here/run"
    with pytest.raises(CheckpointError, match=f"^checkpoint.remote '{missing}' can't be written: FileNotFoundError: The spec"):
        fetch_missing(tmp_path / "run", missing, "auto", lines.append)
    assert server.counts()["CreateBucket"] == server.counts()["PutBucket"] == 0
    server.trouble("PutObject", "AccessDenied")
    succeed(save_all(tmp_path / "run", 1, engines(SMALL, draw(SMALL))))
    with pytest.raises(CheckpointError, match="can't be written: PermissionError: as told: AccessDenied; checkpoint.remote=null"):
        fetch_missing(tmp_path / "run", f"s3://{bucket}/run", "auto", lines.append)
    server.calm()
    server.trouble("ListObjects", "AccessDenied")
    with pytest.raises(CheckpointError, match="can't be written: PermissionError: as told: AccessDenied"):
        fetch_missing(tmp_path / "run", f"s3://{bucket}/run", "auto", lines.append)
    server.calm()
    assert objects(bucket) == []
    cloud.use(monkeypatch, cloud.keyless(server.endpoint))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(CheckpointError, match="can't be written: NoCredentialsError: Unable to locate credentials"):
        fetch_missing(tmp_path / "run", f"s3://{bucket}/run", "auto", lines.append)
    assert lines == []


def test_a_run_that_has_a_whole_checkpoint_starts_though_the_server_is_down(server, bucket, tmp_path, hasty):
    """One that has none does not: the newest may be there."""
    url, lines = f"s3://{bucket}/run", []
    server.trouble("PutObject", "drop", times=99)
    with pytest.raises(CheckpointError, match=f"can't be written: {LOST}"):
        fetch_missing(tmp_path / "run", url, "auto", lines.append)
    succeed(save_all(tmp_path / "run", 1, engines(SMALL, draw(SMALL))))
    assert fetch_missing(tmp_path / "run", url, "auto", lines.append) is None
    assert len(lines) == 1 and lines[0].endswith("it is tried again with every checkpoint")


def test_a_run_without_credentials_ends_before_it_begins(server, tmp_path):
    path = training.write_config(tmp_path, checkpoint={"remote": "s3://bucket/run"})
    [(code, said)] = train(1, cloud.keyless(server.endpoint), path)
    assert code == 2 and said.count("\n") == 1 and "NoCredentialsError: Unable to locate credentials" in said
    assert not (tmp_path / "run/checkpoints").exists()
