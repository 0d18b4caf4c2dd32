"""What saving asks of whoever writes, this process or the writer beside it: jobs as JSON, and an answer for each."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.checkpoint.attempts import told
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import StoredFragment, step_name
from megalm.checkpoint.parts import Content, write_part
from megalm.checkpoint.publish import clean, describe_whole, point_latest, publish
from megalm.checkpoint.remote import Remote
from megalm.checkpoint.retain import Retention, retire
from megalm.checkpoint.sealed import CheckpointError


@dataclass
class Answer:
    """How a job went: `problem` in one line that begins with what was being done, or None; lines for the user."""

    problem: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Performer:
    """Does jobs on a disk, below one run's checkpoints/. `needed`: bytes of the part last written, for what errors say.
    `moved` is called whenever some bytes have reached other storage."""

    root: Path
    disk: Disk
    needed: int = 0
    moved: Callable[[], None] = lambda: None

    def part(self, folder: str, rank: int, entries: Sequence[StoredFragment], content: Content) -> Answer:
        """Write this rank's part into a folder that any rank may have to make."""
        self.needed = sum(entry.bytes for entry in entries)

        def work() -> None:
            self.disk.make_folder(self.root / folder)
            write_part(self.root / folder, rank, entries, content, self.disk)

        return Answer(self._attempt("writing its part", work))

    def whole(self, folder: str, manifest: Mapping[str, Any], documents: Mapping[str, Any], tokenizer_files: Sequence[str],
              retention: Mapping[str, int], needed: Sequence[int] = ()) -> Answer:
        """Make a checkpoint of the parts in the folder: describe it, give it its name, delete those that need not stay. `needed`:
        steps of checkpoints that are still being copied elsewhere."""
        temporary, step, disk = self.root / folder, manifest["step"], self.disk
        problem = self._attempt("describing it", lambda: describe_whole(temporary, manifest, documents, tokenizer_files, disk))
        problem = problem or self._attempt("publishing it", lambda: publish(self.root, temporary, step, self.disk))
        if problem:
            return Answer(problem)
        rule, notes = Retention(**retention), []
        problem = self._attempt("pointing latest to it", lambda: point_latest(self.root, self.disk))
        problem = problem or self._attempt(
            "deleting old ones", lambda: notes.extend(retire(self.root, step, rule, self.disk, needed)))
        return Answer(problem, notes)

    def withdraw(self, url: str, step: int, again: bool = False) -> Answer:
        """Before any rank replaces a file of that step's checkpoint on other storage, it is none there any more."""
        return Answer(_copy(url, lambda remote: remote.withdraw(self.root / step_name(step), again)))

    def upload(self, url: str, step: int, rank: int, ranks: int) -> Answer:
        """Copy one of `ranks` shares of a whole checkpoint's rank files to other storage."""
        folder = self.root / step_name(step)
        return Answer(_copy(url, lambda remote: remote.upload_share(folder, rank, ranks, self.moved)))

    def complete(self, url: str, step: int, retention: Mapping[str, int]) -> Answer:
        """Make a checkpoint there of what the ranks have copied."""
        folder, rule, notes = self.root / step_name(step), Retention(**retention), []
        problem = _copy(url, lambda remote: notes.extend(remote.complete(folder, rule, self.moved)))
        return Answer(problem, notes)

    def clean(self) -> Answer:
        """Remove what attempts have left. On a disk that fails it stays, under hidden names, and the next run tries again."""
        return Answer(self._attempt("cleaning up", lambda: clean(self.root, self.disk)))

    def _attempt(self, doing: str, work: Callable[[], None]) -> str | None:
        try:
            work()
        except Exception as error:  # whatever it is, the ranks wait for an answer
            return f"{doing}: {self._reason(error)}"
        return None

    def _reason(self, error: Exception) -> str:
        """The error in one line; for one of the file system with the bytes needed and free."""
        if not isinstance(error, OSError):
            return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        name = errno.errorcode.get(error.errno, "OSError") if error.errno else type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        needed = f", {self.needed:,} bytes needed" if self.needed else ""
        return f"{error.strerror or error} [{name}]{where}{needed}, {_free_bytes(self.root)} bytes free"


def _copy(url: str, work: Callable[[Remote], None]) -> str | None:
    """Why this can't be done there, in one line, or None."""
    try:
        work(Remote(url))
    except CheckpointError as error:
        return f"copying it: {error}"
    except Exception as error:  # each storage's library has its own
        return f"copying it: {url}: {told(error)}"
    return None


def _free_bytes(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"
