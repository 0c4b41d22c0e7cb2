"""A run on object stores: real servers of their protocols, on loopback; the bytes are those of a run on disk."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pyarrow import fs

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import StorageError
from distributed_eg.store.storage import Storage
from distributed_eg.store.verification import unnamed, verify
from tests.helpers import DOMAINS, SETTINGS, content, outcome, shared_model, tiny_benchmark, tiny_net, tiny_strategy

moto_server = pytest.importorskip("moto.server", reason="moto[server] of the extra test is not installed")
serving = pytest.importorskip("werkzeug.serving")

BENCHMARK = tiny_benchmark(DOMAINS)
KEY, SECRET = "tester", "a-secret-of-the-tests"


class Server:
    """A store behind a switch: ``fault`` sees each request and may answer in the store's place."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.fault: Callable[[dict[str, Any]], str | None] = lambda _: None
        self.requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        status = self.fault(environ)
        if status is None:
            return self._app(environ, start_response)
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", "0")])
        return [b""]


class Quiet(serving.WSGIRequestHandler):  # type: ignore[name-defined,misc]
    """Logs nothing."""

    def log(self, *_: Any) -> None:
        """A request, or a connection that broke."""


@contextmanager
def served(app: Any) -> Iterator[tuple[Server, int]]:
    """A WSGI application on a free port of loopback."""
    server = Server(app)
    http = serving.make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield server, http.server_port
    http.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[Server, str]]:
    """An S3 server, and what a URI of its says after the path."""
    app = moto_server.DomainDispatcherApplication(moto_server.create_backend_app)
    with served(app) as (server, port):
        where = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        made = fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"127.0.0.1:{port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        made.create_dir("bucket")
        yield server, where


def uri_of(where: str, run: str) -> str:
    return f"s3://{KEY}:{SECRET}@bucket/{run}?{where}"


def train(storage: str, *, resume: bool = False, **overrides: Any) -> dict[str, Any]:
    """Train, evaluate; everything that must not depend on where the run is kept."""
    cluster = ClusterConfig(storage=storage, resume=resume, **{"engine": "inline", **overrides})
    with tiny_strategy(cluster, model=shared_model(), **SETTINGS) as strategy:
        strategy.train(BENCHMARK.train_stream)
        return outcome(strategy, strategy.eval(BENCHMARK.test_stream))


def content_of(uri: str) -> dict[str, bytes]:
    """As ``content``, of any storage."""
    storage = Storage(uri)
    passing = ("sessions/", "tables/", "evaluations/")
    kept = [path for path in storage.walk() if not path.startswith(passing)]
    return {path: storage.read(path) for path in kept if not path.endswith(("timings.json", "run.json"))}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, bytes]]:
    storage = tmp_path_factory.mktemp("disk") / "run"
    return train(str(storage)), content(storage)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_the_bytes_are_those_of_a_run_on_disk(s3: tuple[Server, str], on_disk: Any, engine: str) -> None:
    """And it can be verified, gone on with and loaded from there."""
    expected, files = on_disk
    uri = uri_of(s3[1], f"whole-{engine}")
    assert train(uri, engine=engine) == expected
    assert content_of(uri) == files
    assert verify(Storage(uri)).damages == ()
    assert unnamed(Storage(uri)) == []
    assert train(uri, resume=True) == expected
    loaded = ExpertGate.load(uri, arch=tiny_net())
    images = BENCHMARK.test_stream[0].dataset[0][0][None]
    assert int(loaded.gate(images).tasks) in (0, 2)


def test_requests_that_fail_or_are_slow_now_and_then(s3: tuple[Server, str], on_disk: Any) -> None:
    """S3's clients ask again by themselves; nothing of it is seen."""
    server, where = s3
    count = iter(range(10**9))

    def fails(_: dict[str, Any]) -> str | None:
        number = next(count)
        if number % 11 == 5:
            time.sleep(0.2)  # what is tested, not waited for
        return "503 Slow Down" if number % 7 == 3 else None

    server.fault = fails
    try:
        assert train(uri_of(where, "now-and-then"))["registry"] == on_disk[0]["registry"]
    finally:
        server.fault = lambda _: None
    assert content_of(uri_of(where, "now-and-then")) == on_disk[1]


@pytest.mark.parametrize("written", ["autoencoder-", "relatedness.json", "expert-", "manifest.json"])
def test_a_store_that_takes_no_more_ends_the_run_which_can_be_gone_on_with(
    s3: tuple[Server, str], on_disk: Any, written: str
) -> None:
    """From the second task's file on, whatever is written is refused: one clear error, without the secret, and the same
    bytes once there is room."""
    server, where = s3
    uri = uri_of(where, f"full-{written.partition('.')[0]}")

    def full(environ: dict[str, Any]) -> str | None:
        is_write = environ["REQUEST_METHOD"] in ("PUT", "POST")
        return "403 Forbidden" if is_write and f"/00001/{written}" in environ["PATH_INFO"] else None

    server.fault = full
    try:
        with pytest.raises(StorageError) as caught:
            train(uri)
    finally:
        server.fault = lambda _: None
    assert SECRET not in str(caught.value)
    assert train(uri, resume=True) == on_disk[0]
    assert content_of(uri) == on_disk[1]


def test_an_upload_that_is_cut_off_is_sent_again(s3: tuple[Server, str], on_disk: Any) -> None:
    """The connection breaks within the body of an expert's upload, three times."""
    server, where = s3
    uri = uri_of(where, "cut-off")
    cut: list[str] = []

    def breaks(environ: dict[str, Any]) -> str | None:
        path = environ["PATH_INFO"]
        if "partNumber" in environ["QUERY_STRING"] and "/00002/expert-" in path and len(cut) < 3:
            cut.append(path)
            environ["wsgi.input"].read(1000)
            raise ConnectionResetError("cut off")
        return None

    server.fault = breaks
    try:
        assert train(uri) == on_disk[0]
    finally:
        server.fault = lambda _: None
    assert len(cut) == 3
    assert content_of(uri) == on_disk[1]


def test_google_s_store_keeps_the_same_bytes_and_a_store_that_is_gone_is_told(on_disk: Any) -> None:
    """Whose client raises errors of Arrow's own where it does not know better."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"gs://anonymous@bucket/run?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=3"
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        assert train(uri) == on_disk[0]
        assert content_of(uri) == on_disk[1]
        assert verify(Storage(uri)).damages == ()
        assert train(uri, resume=True) == on_disk[0]
    finally:
        server.stop()
    with pytest.raises(StorageError, match=r"does not answer|cannot be written|no readable file"):
        train(uri, resume=True)
    with pytest.raises(StorageError, match=r"names no file system|does not answer|cannot be written"):
        Storage(uri.replace(f":{port}", ":none")).write("a", b"b")
