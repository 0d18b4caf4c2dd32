"""Fixtures: places for checkpoint.remote. A test's module takes them by pytest_plugins."""
from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.checkpoint import cloud


@pytest.fixture(scope="module")
def server() -> Iterator[cloud.Cloud]:
    """One for the tests of a file."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # those made before know another server
    served = cloud.Cloud()
    try:
        yield served
    finally:
        served.close()


@pytest.fixture
def bucket(server: cloud.Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty bucket, which this process and those that it starts have access to."""
    cloud.use(monkeypatch, cloud.environment(server.endpoint))
    name = f"bucket-{secrets.token_hex(4)}"
    fsspec.filesystem("s3").mkdir(name)
    server.calls.clear()
    yield name
    server.calm()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Folders on a disk, which a writer reaches too, objects in memory, and those of the server."""
    urls = {"file": f"file://{tmp_path}/elsewhere/run", "memory": "memory://bucket/run"}
    yield urls.get(request.param) or f"s3://{request.getfixturevalue('bucket')}/run"
    fsspec.filesystem("memory").store.clear()
