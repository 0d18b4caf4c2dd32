"""Checkpoints on other storage: any path that fsspec knows, such as s3://bucket/run, beside the run's own folder.

train.dir stays where checkpoints are made and read; a whole one is copied from there (uploads.py), by each rank its own files,
and checkpoint.json last, by rank 0, once all other files are there in their sizes: object stores have no rename, and a folder
without checkpoint.json is none. Whether large files go in parts is up to fsspec's package for the storage. Nothing here needs
torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.checkpoint import sealed
from megalm.checkpoint.find import read_manifest
from megalm.checkpoint.format import MANIFEST, index_file, rank_file, step_name, step_of
from megalm.checkpoint.retain import Retention
from megalm.checkpoint.sealed import CheckpointError


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
        self.url, self._path = url, path.rstrip("/")

    def has(self, folder: Path) -> bool:
        """Whether this very checkpoint is complete there."""
        there = self._manifest(folder.name)
        return self._exists(there) and self._files.cat_file(there) == (folder / MANIFEST).read_bytes()

    def upload(self, folder: Path, names: list[str], moved: Callable[[], None] = lambda: None) -> None:
        """Copy these files of a whole checkpoint's folder. `moved` is called whenever some bytes are there."""
        for name in names:
            target = f"{self._path}/{folder.name}/{name}"
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._put(folder / name, target, moved)
            moved()

    def _put(self, path: Path, target: str, moved: Callable[[], None]) -> None:
        """Copy one file. On a file system that is mounted here, fsspec's way gives no sign of life until it is done."""
        from fsspec.callbacks import Callback
        from fsspec.implementations.local import LocalFileSystem

        if not isinstance(self._files, LocalFileSystem):
            self._files.put_file(str(path), target, callback=Callback(hooks={"moved": lambda *_, **__: moved()}))
            return
        with open(path, "rb") as source, open(target, "wb") as copy:
            while block := source.read(sealed.BLOCK_BYTES):
                copy.write(block)
                moved()
            copy.flush()
            os.fsync(copy.fileno())

    def upload_share(self, folder: Path, rank: int, ranks: int, moved: Callable[[], None] = lambda: None) -> None:
        """Copy every `ranks`-th pair of rank files from the `rank`-th on; nothing where the checkpoint is there already."""
        if not self.has(folder):
            numbers = range(rank, read_manifest(folder)["world_size"], ranks)
            self.upload(folder, [name for number in numbers for name in (rank_file(number), index_file(number))], moved)

    def withdraw(self, folder: Path) -> None:
        """What is there of this step, unless it is this very checkpoint, is none any more: its files are about to be replaced."""
        if not self.has(folder) and self._exists(self._manifest(folder.name)):
            self._files.rm_file(self._manifest(folder.name))

    def complete(self, folder: Path, rule: Retention, moved: Callable[[], None] = lambda: None) -> list[str]:
        """Copy what no rank has, checkpoint.json last, and delete what the rule doesn't keep; returns what went wrong with that.

        Raises CheckpointError, and leaves the upload without a checkpoint.json, where a rank's file isn't there.
        """
        manifest = read_manifest(folder)
        if self.has(folder):
            return []
        ranks = {name for rank in range(manifest["world_size"]) for name in (rank_file(rank), index_file(rank))}
        self.upload(folder, [name for name in manifest["files"] if name not in ranks], moved)
        for name, stated in manifest["files"].items():
            target = f"{self._path}/{folder.name}/{name}"
            size = self._files.size(target) if self._exists(target) else None
            moved()
            if size != stated["bytes"]:
                raise CheckpointError(f"{name} has {size} bytes there, not {stated['bytes']}")
        self.upload(folder, [MANIFEST])
        try:
            self._retire(manifest["step"], rule, moved)
        except Exception as error:  # each storage's library has its own
            return [f"{folder.name} is in {self.url}, but older ones could not be deleted there: {type(error).__name__}: {error}"]
        return []

    def steps(self) -> list[int]:
        """The steps of those that are complete, the newest first."""
        try:
            paths = self._files.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        found = {step_of(path.rstrip("/").rpartition("/")[2]) for path in paths}
        complete = (step for step in found if step is not None and self._exists(self._manifest(step_name(step))))
        return sorted(complete, reverse=True)

    def manifest(self, step: int) -> bytes:
        """The content of its checkpoint.json."""
        return self._files.cat_file(self._manifest(step_name(step)))

    def get(self, step: int, name: str, target: Path) -> None:
        """Copy one file of it to `target`."""
        self._files.get_file(f"{self._path}/{step_name(step)}/{name}", str(target))

    def _retire(self, step: int, rule: Retention, moved: Callable[[], None]) -> None:
        whole = [(number, self._loss(number)) for number in self.steps() if number <= step]
        kept = rule.kept(whole)
        for number, _ in whole:
            if number not in kept:
                self._files.rm_file(self._manifest(step_name(number)))  # first: what is left is none any more
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm(f"{self._path}/{step_name(number)}", recursive=True)
                moved()

    def _loss(self, step: int) -> float | None:
        content: Any = sealed.parse(self.manifest(step), Path(step_name(step)))
        return content.get("eval_loss") if isinstance(content, dict) else None

    def _manifest(self, name: str) -> str:
        return f"{self._path}/{name}/{MANIFEST}"

    def _exists(self, path: str) -> bool:
        """Whether there is such a file; fsspec's own `exists` says no where the storage doesn't answer."""
        try:
            self._files.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True
