"""Checkpoints on other storage: any path that fsspec knows, such as s3://bucket/run, beside the run's own folder.

train.dir stays where checkpoints are made and read; a whole one is copied from there (uploads.py), by each rank its own files,
and checkpoint.json last, by rank 0, once all other files are there in their sizes: object stores have no rename, and a folder
without checkpoint.json is none. `latest` is written just before: it says where the run is, even if nothing more comes. Whether
large files go in parts is up to fsspec's package for the storage. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.checkpoint import sealed
from megalm.checkpoint.attempts import attempt, told
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import read_manifest, turn
from megalm.checkpoint.format import (
    LATEST,
    MANIFEST,
    NEW_LATEST,
    TEMPORARY_PREFIX,
    index_file,
    latest_text,
    parse_latest,
    rank_file,
    step_name,
    step_of,
)
from megalm.checkpoint.retain import Retention
from megalm.checkpoint.sealed import CheckpointError, DamagedError

BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"})
"""Kinds of storage whose folders are but names, and where making one would make a bucket of a mistyped name."""
MOST_PARTS = 10_000
"""Of one file, on S3."""


class Remote:
    """The checkpoints below one URL. Methods raise OSError, and what the storage's library raises."""

    def __init__(self, url: str) -> None:
        """Raises CheckpointError where fsspec, or its package for this kind of storage, doesn't take the URL."""
        try:
            import fsspec

            self._files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # each storage's package has its own, of missing credentials for one
            line = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"checkpoint.remote {url!r}: {line}") from error
        kinds = self._files.protocol
        self._kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        self.url, self._path = url, path.rstrip("/")

    @property
    def _mounted(self) -> bool:
        """Whether it is a file system of this machine's."""
        return "file" in self._kinds

    def check(self) -> None:
        """Write, read and delete a small file, list, and look for what isn't there, as every copy has to."""
        name, content = f"{self._path}/{TEMPORARY_PREFIX}{secrets.token_hex(8)}", b"megalm was here"
        self._make_folder(self._path)
        try:
            self._files.pipe_file(name, content)
            found = self._files.cat_file(name)
            self._files.rm_file(name)
        except BaseException:
            with contextlib.suppress(Exception):
                self._files.rm_file(name)
            raise
        if found != content:
            raise OSError(f"of {content!r}, which was written there, {found!r} was read")
        self._found()
        self._exists(name)

    def has(self, folder: Path) -> bool:
        """Whether this very checkpoint is complete there."""
        there = self._manifest(folder.name)
        return self._exists(there) and self._files.cat_file(there) == (folder / MANIFEST).read_bytes()

    def _lacks(self, folder: Path) -> bool:
        """Whether a file is missing there, or of another size."""
        files = read_manifest(folder)["files"].items()
        return any(self._size(f"{self._path}/{folder.name}/{name}") != stated["bytes"] for name, stated in files)

    def upload(self, folder: Path, names: list[str], moved: Callable[[], None] = lambda: None) -> None:
        """Copy these files of a whole checkpoint's folder. `moved` is called whenever some bytes are there.

        Raises CheckpointError, which says which file couldn't be copied and why.
        """
        for name in names:
            there = f"{folder.name}/{name}"
            try:
                attempt(lambda name=name, there=there: self._put(folder / name, f"{self._path}/{there}", moved))
            except Exception as error:  # each storage's library has its own
                raise CheckpointError(f"{self.url}/{there}: {told(error)}") from error
            moved()

    def _put(self, path: Path, target: str, moved: Callable[[], None]) -> None:
        """Copy one file. On a file system that is mounted here, fsspec's way gives no sign of life until it is done, and leaves
        half of a file under its name where it ends early."""
        from fsspec.callbacks import Callback

        self._make_folder(target.rpartition("/")[0])
        if not self._mounted:
            part = self._files.storage_options.get("default_block_size")
            more = {"chunksize": max(int(part), -(-path.stat().st_size // MOST_PARTS))} if part else {}
            self._files.put_file(str(path), target, callback=Callback(hooks={"moved": lambda *_, **__: moved()}), **more)
            return
        part = Path(target).with_name(TEMPORARY_PREFIX + path.name)
        with open(path, "rb") as source, open(part, "wb") as copy:
            while block := source.read(sealed.BLOCK_BYTES):
                copy.write(block)
                moved()
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(part, target)
        Disk().sync_folder(part.parent)

    def upload_share(self, folder: Path, rank: int, ranks: int, moved: Callable[[], None] = lambda: None) -> None:
        """Copy every `ranks`-th pair of rank files from the `rank`-th on; nothing where the checkpoint is there already."""
        if not self.has(folder):
            numbers = range(rank, read_manifest(folder)["world_size"], ranks)
            self.upload(folder, [name for number in numbers for name in (rank_file(number), index_file(number))], moved)

    def withdraw(self, folder: Path, again: bool = False) -> None:
        """What is there of this step, unless it is this very checkpoint, is none any more: its files are about to be replaced.

        `again`: even if it is this very one, by its checkpoint.json. The same run says the same when it comes to a step again,
        as it does where what was there had been damaged.
        """
        if self._exists(self._manifest(folder.name)) and (again or not self.has(folder) or self._lacks(folder)):
            self._files.rm_file(self._manifest(folder.name))

    def complete(self, folder: Path, rule: Retention, moved: Callable[[], None] = lambda: None) -> list[str]:
        """Copy what no rank has, checkpoint.json last, and delete what the rule doesn't keep, and what copies that ended early
        have left; returns what went wrong with that.

        Raises CheckpointError, and leaves the upload without a checkpoint.json, where a rank's file isn't there.
        """
        manifest = read_manifest(folder)
        if not self.has(folder):
            self._complete(folder, manifest, moved)
        elif self._latest() != manifest["step"]:  # a run that was put back to it
            self._point_latest(folder)
        try:
            self._retire(manifest["step"], rule, moved)
        except Exception as error:  # each storage's library has its own
            return [f"{folder.name} is in {self.url}, but older ones could not be deleted there: {told(error)}"]
        return []

    def _complete(self, folder: Path, manifest: dict[str, Any], moved: Callable[[], None]) -> None:
        ranks = {name for rank in range(manifest["world_size"]) for name in (rank_file(rank), index_file(rank))}
        self.upload(folder, [name for name in manifest["files"] if name not in ranks], moved)
        for name, stated in manifest["files"].items():
            size = self._size(f"{self._path}/{folder.name}/{name}")
            moved()
            if size != stated["bytes"]:
                raise CheckpointError(f"{self.url}/{folder.name}/{name} has {size} bytes there, not {stated['bytes']}")
        self._point_latest(folder)
        self.upload(folder, [MANIFEST])

    def _point_latest(self, folder: Path) -> None:
        """Before the checkpoint is one: where it never gets that far, a run goes on from those before it, as this one did."""
        target, content = f"{self._path}/{LATEST}", latest_text(folder.name, sealed.seal_of((folder / MANIFEST).read_bytes()))
        if self._mounted:
            new, disk = Path(f"{self._path}/{NEW_LATEST}"), Disk()
            disk.remove(new)
            disk.write(new, [content])
            disk.rename(new, Path(target))
            disk.sync_folder(new.parent)
        else:
            attempt(lambda: self._files.pipe_file(target, content))

    def steps(self) -> list[int]:
        """The steps of those that are complete, in the order in which a run would go on from them (find.preferred)."""
        named = self._latest()
        return sorted((step for step in self._found() if self._exists(self._manifest(step_name(step)))),
                      key=lambda step: turn(step, named))

    def _found(self) -> set[int]:
        """The steps of everything that is named as a checkpoint."""
        try:
            paths = self._files.ls(self._path, detail=False)
        except FileNotFoundError:
            return set()
        return {step for path in paths if (step := step_of(path.rstrip("/").rpartition("/")[2])) is not None}

    def _latest(self) -> int | None:
        """The step that `latest` names, whether or not it is complete; None where nothing of use is said."""
        if not self._exists(f"{self._path}/{LATEST}"):
            return None
        step, seal = parse_latest(self._files.cat_file(f"{self._path}/{LATEST}"))
        if step is None or seal is None or not self._exists(self._manifest(step_name(step))):
            return step
        return step if sealed.seal_of(self.manifest(step)) in (seal, None) else None

    def manifest(self, step: int) -> bytes:
        """The content of its checkpoint.json."""
        return self._files.cat_file(self._manifest(step_name(step)))

    def get(self, step: int, name: str, target: Path) -> None:
        """Copy one file of it to `target`."""
        self._files.get_file(f"{self._path}/{step_name(step)}/{name}", str(target))

    def _retire(self, step: int, rule: Retention, moved: Callable[[], None]) -> None:
        """Of the steps up to this one, which are all that this run copies until the next, what isn't kept."""
        found = sorted(number for number in self._found() if number <= step)
        whole = []
        for number in found:
            with contextlib.suppress(DamagedError):
                if self._exists(self._manifest(step_name(number))):
                    whole.append((number, self._loss(number)))
        for number in sorted(set(found) - rule.kept(whole)):
            place = f"{self._path}/{step_name(number)}"
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._manifest(step_name(number)))  # first: what is left is none any more
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(place, recursive=True)
            if left := self._files.find(place):  # S3's package says nothing of files that may not be deleted
                raise OSError(f"{left[0]} is still there")
            moved()
        self._end_uploads(step)

    def _end_uploads(self, step: int) -> None:
        """S3 keeps, and charges for, the parts of an upload that nobody has ended; no listing of files shows them."""
        if not hasattr(self._files, "abort_mpu"):
            return
        bucket, key, _ = self._files.split_path(self._path)
        prefix = f"{key}/" if key else ""
        try:
            answer = self._files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}step_")
            for upload in answer.get("Uploads", []):
                number = step_of(upload["Key"].removeprefix(prefix).partition("/")[0])
                if number is not None and number <= step:
                    with contextlib.suppress(FileNotFoundError):
                        self._files.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        except OSError as error:  # a right of its own, and an operation that not all have, which a run can do without: README.md
            if not isinstance(error, PermissionError) and error.errno != errno.ENOSYS:
                raise

    def _loss(self, step: int) -> float | None:
        content: Any = sealed.parse(self.manifest(step), Path(step_name(step)))
        if not isinstance(content, dict) or content.get("step") != step:
            raise DamagedError(f"{MANIFEST} of {step_name(step)} isn't one")
        return content.get("eval_loss")

    def _manifest(self, name: str) -> str:
        return f"{self._path}/{name}/{MANIFEST}"

    def _exists(self, path: str) -> bool:
        return self._size(path) is not None

    def _size(self, path: str) -> int | None:
        """In bytes; None where there is no such file. fsspec's own `exists` says no where the storage doesn't answer."""
        try:
            return self._files.info(path)["size"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _make_folder(self, path: str) -> None:
        if not self._kinds & BUCKETS:
            self._files.makedirs(path, exist_ok=True)
