"""The folder PREFIX.work: what a stopped run has done, and what it was asked to do.

    run.json      what the output depends on: options, tokenizer, inputs
    state.json    the unit and the part that come next in the files below, and how long these were then; counts
    *.part        parts that aren't in yet (unit-number.part)
    *.partial     what is being written, a part or the text for one
    tokens, lengths, counts ...    the data set as far as it has come

state.json is written after the files it speaks of are on the disk, and parts go only after it: whatever happens in between,
the files are cut back to what it says, and the parts are there again.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megalm.data.errors import DataError
from megalm.data.publish import PARTIAL, write_atomically

from .inputs import Source, find_source, split_name

RUN, STATE, LOCK, STREAM = "run.json", "state.json", "lock", "stream-"
SHOWN = 4
PATIENCE = 3.0  # seconds, with a lock that another process has
COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # by how they begin
# What is done under these holds under any other value too: nothing had to be left out or mended, everything was compared.
RELAXED = (("skip_invalid", False), ("encoding_errors", "stop"), ("verify", True))


class Work:
    """The folder of one output, locked against a second process. Used as a context."""

    def __init__(self, prefix: str):
        self.prefix, self.folder = prefix, Path(f"{prefix}.work")
        self._lock: int | None = None
        self._streams = 0
        self._gone = False
        self.published = False  # has the data set its final names

    def __enter__(self) -> Work:
        """Raises DataError if another process is at it, and stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            raise DataError(f"{self.prefix}: another process finishes writing it at this moment") from None
        if not self._take_lock():
            os.close(self._lock)
            self._lock = None
            raise DataError(f"{self.prefix}: another process is writing it now")
        if not self._locked_here():  # who held the lock has removed the folder since it was opened
            os.close(self._lock)
            self._lock = None
            raise DataError(f"{self.prefix}: another process finishes writing it at this moment")
        self._sweep()
        return self

    def __exit__(self, *_) -> None:
        if not self._gone and not self.worth_keeping:  # a second time it might be another process's
            self.clear()
        elif not self._gone:
            self._sweep()
        if self._lock is not None:
            os.close(self._lock)

    def _take_lock(self) -> bool:
        """A killed program's workers, which end with it, have its lock for a moment longer: that is waited for."""
        late = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > late:
                    return False
                time.sleep(0.05)
            except OSError:
                return True  # a file system without locks: two writers at once aren't noticed there
            else:
                return True

    def _sweep(self) -> None:
        """Remove what somebody was writing when he was stopped."""
        for left in self.folder.glob(f"*{PARTIAL}"):
            left.unlink(missing_ok=True)

    def _locked_here(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._lock), os.stat(self.folder / LOCK))
        return False

    @property
    def begun(self) -> bool:
        return (self.folder / RUN).exists()

    @property
    def worth_keeping(self) -> bool:
        """Is there anything to go on from?"""
        return self.begun and ((self.folder / STATE).exists() or any(self.folder.glob("*.part")))

    def left(self) -> str:
        """What somebody has who is stopped now, in words."""
        if self.published:
            return f"the data set is written{'; the same command does the rest' if self.worth_keeping else ''}"
        if self.worth_keeping:
            return f"what is done is kept in {self.folder}: the same command goes on"
        return "nothing was written"

    def begin(self, run: dict) -> bool:
        """Note what is to be done, or check that it is what was begun; True if there is something to go on from.

        Raises DataError, which says what is different.
        """
        run = json.loads(json.dumps(run))
        begun = self.begun
        if begun:
            old = self.run()
            changes = differences(old, run)
            if changes:
                more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
                raise DataError(f"{self.folder} holds a run that was begun otherwise: {'; '.join(changes[:SHOWN])}{more}; go on "
                                "with it as it was, or begin anew with --restart")
        else:
            self.clear(keep=(LOCK, *(path.name for path in self.folder.glob(f"{STREAM}*"))))
        write_atomically(self.folder / RUN, [json.dumps(run, indent=1).encode()])
        return begun

    def run(self) -> dict | None:
        """What was to be done, where something was begun."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / RUN).read_text())
        return None

    def restart(self) -> None:
        """Forget what an earlier run has done."""
        self.clear(keep=(LOCK,))

    def store_stream(self, name: str) -> Source:
        """Standard input or a pipe, plain or compressed, as a file of the folder; where an earlier run has stored it, it is read
        to be compared.

        Raises DataError if it isn't what was stored.
        """
        shown = "standard input" if name == "-" else name
        with open(0, "rb", closefd=False) if name == "-" else open(name, "rb") as stream:
            head = stream.read(4)
            suffix = next((suffix for magic, suffix in COMPRESSED.items() if head.startswith(magic)), "")
            path = self.folder / f"{STREAM}{self._streams}.{split_name(name)[0] or 'jsonl'}{suffix}"
            self._streams += 1
            if self.begun and path.exists():
                self._compare(head, stream, path, shown)
            else:
                partial = path.with_name(path.name + PARTIAL)
                with open(partial, "wb") as file:
                    file.write(head)
                    shutil.copyfileobj(stream, file, 1 << 20)
                os.replace(partial, path)
        return replace(find_source(str(path)), stream=shown)

    @staticmethod
    def _compare(head: bytes, stream, path: Path, shown: str) -> None:
        with open(path, "rb") as stored:
            block = head
            while block == stored.read(len(block) or 1):
                if not block:
                    return
                block = stream.read(1 << 20)
        raise DataError(f"{shown} isn't what the run that is begun in {path.parent} has read; --restart begins anew")

    def state(self) -> dict | None:
        """What was noted last."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / STATE).read_text())
        return None

    def save(self, state: dict) -> None:
        write_atomically(self.folder / STATE, [json.dumps(state).encode()])

    def clear(self, keep: Sequence[str] = ()) -> None:
        """Remove everything but some files, first what says that there is a run: a folder half removed is none to go on from."""
        for name in (RUN, STATE):
            (self.folder / name).unlink(missing_ok=True)
        if keep:
            self._remove_all_but(keep)
            return
        self._gone = True
        with contextlib.suppress(OSError):
            self._remove_all_but((LOCK,))  # the lock goes last: behind it the folder may be another's
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_all_but(self, keep: Sequence[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink()


def differences(old: dict, new: dict, name: str = "") -> list[str]:
    """What is different between two records, in words."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        was, now = old.get(key), new.get(key)
        if was == now or (key, was) in RELAXED:
            continue
        if key == "inputs":
            found += input_differences(was, now)
        elif isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f"{name}{key}.")
        else:
            found.append(f"{name}{key} was {json.dumps(was)} and is {json.dumps(now)}")
    return found


def input_differences(old: list[dict], new: list[dict]) -> list[str]:
    was, now = ({source["path"]: source for source in sources} for sources in (old, new))
    found = [f"input {path} is gone" for path in was if path not in now]
    found += [f"input {path} is new" for path in now if path not in was]
    found += [f"input {path} has changed ({was[path]['size']} bytes then, {now[path]['size']} now)"
              for path in now if path in was and was[path] != now[path]]
    return found or ["the inputs are in another order"]
