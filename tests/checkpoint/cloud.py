"""An S3 server: moto's, in a thread of the tests' process, that counts what is asked and gets into trouble when it is told to."""
from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

HOLD_SECONDS = 60.0
"""A request that is held goes on by itself after so long."""
ANSWERS = {"SlowDown": "503 Slow Down", "InternalError": "500 Internal Server Error", "AccessDenied": "403 Forbidden"}
PARTS = {("POST", "uploads"): "CreateMultipartUpload", ("PUT", "partNumber"): "UploadPart",
         ("POST", "uploadId"): "CompleteMultipartUpload", ("DELETE", "uploadId"): "AbortMultipartUpload",
         ("GET", "uploads"): "ListMultipartUploads", ("POST", "delete"): "DeleteObjects"}
REST = {"PUT": "Put", "GET": "Get", "HEAD": "Head", "DELETE": "Delete", "POST": "Post"}


def operation(environ: dict[str, Any]) -> str:
    """S3's name for a request."""
    method, query = environ["REQUEST_METHOD"], parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    for (wanted, key), name in PARTS.items():
        if method == wanted and key in query:
            return name
    if method == "GET" and "list-type" in query:
        return "ListObjects"
    return REST[method] + ("Object" if "/" in environ["PATH_INFO"].strip("/") else "Bucket")


@dataclass
class Trouble:
    """What happens to the next `times` requests of one operation ("": of any) after the first `after`, of objects whose key ends
    with `end`.

    `kind`: one of ANSWERS; "drop": the connection ends without one; "lost": it ends after what was asked is done; "hold":
    nothing, until `release` is set.
    """

    operation: str
    kind: str
    times: int = 1
    after: int = 0
    end: str = ""
    met: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def strikes(self, name: str, path: str) -> bool:
        if self.operation not in ("", name) or not path.endswith(self.end) or self.times <= 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        self.met.set()
        return True


class Cloud:
    """The server at `endpoint`. `calls`: (operation, path) of every request since it was last cleared."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self._lock, self._troubles = threading.Lock(), []
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.port}"

    def close(self) -> None:
        self.calm()
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def trouble(self, operation: str, kind: str, **more: Any) -> Trouble:
        """From now on."""
        self._troubles.append(Trouble(operation, kind, **more))
        return self._troubles[-1]

    def calm(self) -> None:
        """No trouble any more."""
        for trouble in self._troubles:
            trouble.release.set()
        self._troubles.clear()

    def counts(self) -> Counter[str]:
        """How many requests there were of each operation."""
        return Counter(name for name, _ in self.calls)

    def _serve(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        name, path = operation(environ), environ["PATH_INFO"]
        with self._lock:
            self.calls.append((name, path))
            kind, trouble = next(((each.kind, each) for each in self._troubles if each.strikes(name, path)), ("", None))
        if kind == "hold":
            trouble.release.wait(HOLD_SECONDS)
        if kind == "lost":
            b"".join(self._application(environ, lambda *_: None))
        if kind in ("drop", "lost"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError("as told")
        if kind in ANSWERS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<?xml version='1.0'?><Error><Code>{kind}</Code><Message>as told: {kind}</Message></Error>".encode()
            start_response(ANSWERS[kind], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return self._application(environ, start_response)


class _Quiet(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        return


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """These variables, and no other that S3's libraries look at, for this process and those that it starts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def keyless(endpoint: str) -> dict[str, str]:
    """The environment of a machine that has no credentials."""
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "NO_PROXY": "127.0.0.1"}


def environment(endpoint: str) -> dict[str, str]:
    """The environment of one that has."""
    return {**keyless(endpoint), "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "a test's"}
