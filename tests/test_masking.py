"""No message, log, record or repr tells what a URI keeps secret."""

from __future__ import annotations

import logging
import pickle
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.config import MethodConfig
from distributed_eg.errors import ExpertGateError, ResourceError
from distributed_eg.masking import masked, masked_in
from distributed_eg.runtime.messages import WorkerSetup
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.store.checkpoints import CheckpointSlot
from distributed_eg.store.storage import Artifact, Storage
from tests.helpers import SHAPE, tiny_benchmark, tiny_net, tiny_strategy

USER, SECRET = "AKIA0EXAMPLE", "wJalr+Utn/FEMI.K7"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("runs/a", "runs/a"),
        ("/data/a@b:c/run?x=1", "/data/a@b:c/run?x=1"),
        ("s3://bucket/run-7", "s3://bucket/run-7"),
        ("s3://bucket/run@v1", "s3://bucket/run@v1"),
        ("hdfs://host:9000/run", "hdfs://host:9000/run"),
        ("s3://KEY:SECRET@bucket/run", "s3://***@bucket/run"),
        ("s3://KEY:SE/CRET@bucket/run", "s3://***@bucket/run"),
        ("s3://KEY:SE?CR#ET@bucket/run", "s3://***@bucket/run"),
        ("s3://KEY:SE@CRET@bucket/run", "s3://***@bucket/run"),
        ("https://TOKEN@host/run", "https://***@host/run"),
        ("abfs://:KEY@account.blob.core.windows.net/run", "abfs://***@account.blob.core.windows.net/run"),
        (
            "s3://b/r?region=eu-1&endpoint_override=http://minio:9000",
            "s3://b/r?region=eu-1&endpoint_override=http://minio:9000",
        ),
        ("s3://b/r?endpoint_override=https%3A%2F%2Fu%3Ap%40h", "s3://b/r?endpoint_override=***"),
        ("s3://b/r?access_key=a&secret_key=b&scheme=http", "s3://b/r?access_key=***&secret_key=***&scheme=http"),
        (
            "https://a.blob.core.windows.net/c/r?sv=2024&sig=a%2Bb%3D",
            "https://a.blob.core.windows.net/c/r?sv=***&sig=***",
        ),
        ("gs://b/r?ya29.token", "gs://b/r?***"),
        ("s3://K:S@b/r?secret_key=x", "s3://***@b/r?secret_key=***"),
    ],
)
def test_what_is_shown(uri: str, shown: str) -> None:
    assert masked(uri) == shown
    assert masked(shown) == shown
    assert masked_in(f"Cannot open '{uri}'.") == (
        f"Cannot open '{shown}'." if "://" in uri else f"Cannot open '{uri}'."
    )


SECRETS = st.text(st.characters(codec="ascii", exclude_characters="*&;", min_codepoint=33), min_size=8, max_size=40)


@example("00000000", "000000:@", str)  # an "@" that ends no password
@given(SECRETS, SECRETS, st.sampled_from([str, lambda secret: quote(secret, safe="")]))
def test_no_secret_is_shown_raw_or_quoted(user: str, secret: str, write: Callable[[str], str]) -> None:
    user, written = f"u{user}", write(secret)
    for uri in (f"s3://{quote(user)}:{written}@bucket/run", f"s3://bucket/run?secret_key={written}"):
        for told in (masked(uri), masked_in(f"no such key {written} in {uri!s}: denied", uri)):
            assert secret not in told
            assert written not in told


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://{USER}:{SECRET}@bucket/run",  # the slash ends the host: pyarrow quotes it all in its error
        f"s3://bucket/run?access_key={USER}&secret_key={quote(SECRET)}",
        f"gs://bucket/run?token={quote(SECRET)}&user={USER}",
        f"nonsense://{USER}:{quote(SECRET, safe='')}@host/run",
    ],
)
def test_a_storage_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(ExpertGateError) as caught:
        Storage(uri)
    told = "".join(traceback.format_exception(caught.value)) + str(pickle.loads(pickle.dumps(caught.value)))
    assert "***" in told
    assert_tells_nothing(told)
    for give in (
        lambda: ExpertGate.load(uri),
        lambda: tiny_strategy(ClusterConfig(engine="inline", storage=uri)).train(STREAM),
    ):
        with pytest.raises(ExpertGateError) as caught:
            give()
        assert_tells_nothing("".join(traceback.format_exception(caught.value)))


STREAM = tiny_benchmark((0,)).train_stream


def assert_tells_nothing(told: str) -> None:
    for secret in (USER, SECRET, quote(SECRET), quote(SECRET, safe="")):
        assert secret not in told


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from distributed_eg.runtime.ray_backend.cluster import attach_or_start

    def no_cluster(address: str, **_: object) -> None:
        raise ConnectionError(f"nothing at {address}")

    monkeypatch.setattr(ray, "init", no_cluster)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ResourceError, match=r"\*\*\*@host") as caught:
        attach_or_start(ClusterConfig(address=f"ray://{USER}:{SECRET}@host:1"), 1)
    assert_tells_nothing("".join(traceback.format_exception(caught.value)))


def test_a_whole_run_tells_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Neither its records, nor its log, nor what is printed of its parts; only ``run_dir``, to open it by."""
    pytest.importorskip("fsspec")
    caplog.set_level(logging.DEBUG, "distributed_eg")
    uri = f"fsspec+memory://{USER}:{SECRET}@bucket-{uuid.uuid4().hex}/run"
    config = ClusterConfig(engine="inline", storage=uri, resume=True, address=None)
    with tiny_strategy(config) as strategy:
        strategy.train(STREAM)
        run_dir = strategy.run_dir
        assert run_dir == uri
        assert_tells_nothing(repr(strategy.registry.to_pylist()))
    storage = Storage(uri)
    assert len(storage.walk()) > 10
    for path in storage.walk():
        assert_tells_nothing(storage.read(path).decode("latin-1") + path)
    setup = WorkerSetup(
        uri,
        "id",
        1,
        Shipped(b"", (), "the network"),
        Artifact("root", "abc", 1),
        "head",
        "features",
        SHAPE,
        MethodConfig(),
        config,
        None,
    )
    slot = CheckpointSlot(storage, 0, "key")
    assert_tells_nothing(f"{config!r} {config} {storage!r} {setup!r} {slot!r}")
    assert "***@bucket" in repr(config)
    assert pickle.loads(pickle.dumps(config)).storage == uri
    with tiny_strategy(config, seed=1) as strategy, pytest.raises(ExpertGateError, match=r"\*\*\*@bucket") as caught:
        strategy.train(STREAM)
    assert_tells_nothing(str(caught.value))
    storage.write("tasks/00000/manifest.json", b"{")
    with pytest.raises(ExpertGateError, match=r"\*\*\*@bucket") as caught:
        ExpertGate.load(run_dir, arch=tiny_net())
    assert_tells_nothing("".join(traceback.format_exception(caught.value)))
    with tiny_strategy(config) as strategy:
        strategy.train(STREAM)
    assert_tells_nothing(caplog.text)
    assert torch.is_tensor(ExpertGate.load(run_dir, arch=tiny_net())(torch.rand(2, *SHAPE)))
