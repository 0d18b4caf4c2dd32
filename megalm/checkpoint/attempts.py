"""Asking other storage for something: again after a pause where it may work then, and what it says in one line."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PAUSES = (1.0, 5.0)
"""Seconds before what failed is tried again. Each storage's own package has tried several times by then."""
REFUSALS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "CredentialUnavailableError"}
"""What packages raise where there are none; that some couldn't be got just now is another matter."""


def refused(error: Exception) -> bool:
    """Whether the storage, or its package, said no, rather than nothing of use: without credentials, for one."""
    return (isinstance(error, REFUSALS) or type(error).__name__ in NO_CREDENTIALS
            or (isinstance(error, OSError) and error.errno == errno.EROFS))


def attempt(work: Callable[[], T]) -> T:
    """The result of `work`, tried again where it isn't refused. Raises what it raised last."""
    for pause in (*PAUSES, None):
        try:
            return work()
        except Exception as error:  # each storage's library has its own
            if pause is None or refused(error):
                raise
        time.sleep(pause)
    raise AssertionError


def told(error: BaseException) -> str:
    """The error in one line: its kind, what it says, and the file that it is about, where that is one of this machine's."""
    if isinstance(error, OSError):
        said = f"{error.strerror or error}" + (f" ({error.filename})" if isinstance(error.filename, str) else "")
        kind = errno.errorcode.get(error.errno or 0, "OSError") if type(error) is OSError else type(error).__name__
    else:
        said, kind = str(error), type(error).__name__
    line = " ".join(said.split())
    return f"{kind}: {line}" if line else kind
