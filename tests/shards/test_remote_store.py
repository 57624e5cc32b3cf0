"""Images in an object store, asked of a real S3 server on loopback."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from tests.shards.servers import s3_environment, serve_s3

from linerate.shards import remote_store
from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote import RemoteReader

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

OPTIONS = FetchOptions(timeout_s=5, retries=1, backoff_s=0.01, in_flight=4)
FILES = {f"a {i}?#.jpg": bytes([i]) * (1000 + i) for i in range(12)}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serve_s3() as running:
        yield running


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("objects")
    for name, data in FILES.items():
        store.pipe_file(f"objects/{name}", data)
    store.pipe_file("objects/empty.jpg", b"")
    yield "objects"
    store.rm("objects", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def read(urls: list[str], options: FetchOptions = OPTIONS, *, max_bytes: int = 1 << 20) -> list[Any]:
    found: list[Any] = []
    with RemoteReader(urls, options, max_bytes=max_bytes) as reader:
        for _ in urls:
            try:
                found.append(bytes(reader.next()))
            except RejectedError as error:
                found.append(str(error))
        assert reader._memory._used == 0
    return found


def test_objects_come_in_order_whatever_their_names(bucket: str) -> None:
    assert read([f"s3://{bucket}/{name}" for name in FILES]) == list(FILES.values())


def test_an_object_without_bytes_is_empty(bucket: str) -> None:
    assert read([f"s3://{bucket}/empty.jpg"]) == [b""]


def test_what_one_request_does_not_hold_is_read_whole(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (999, 1000, 1001):
        monkeypatch.setattr(remote_store, "FIRST_BYTES", first)
        assert read([f"s3://{bucket}/a 0?#.jpg"]) == [FILES["a 0?#.jpg"]]


def test_an_object_of_too_many_bytes_is_rejected_and_not_read(bucket: str) -> None:
    urls = [f"s3://{bucket}/a {i}?#.jpg" for i in (0, 1)]
    assert read(urls, max_bytes=1000) == [FILES["a 0?#.jpg"], "too many bytes: more than 1000"]


def test_what_is_not_there_is_not_found(bucket: str) -> None:
    assert read([f"s3://{bucket}/none.jpg", "s3://no-such-bucket/x.jpg"]) == [
        "not found: NoSuchKey",
        "not found: NoSuchBucket",
    ]


def test_without_credentials_nothing_is_rejected_but_the_run_stops(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="the object store wants credentials: Unable to locate credentials"):
        read([f"s3://{bucket}/a 0?#.jpg"])


def test_a_store_that_does_not_answer_is_unreachable(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    (said,) = read([f"s3://{bucket}/a 0?#.jpg"])
    assert said.startswith("unreachable: ")
    assert said.endswith("after 2 tries")


@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is here: its absence stays untested"
)
def test_a_library_that_is_missing_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match=r"gs:// needs a library.*pip install 'linerate\[gcs\]'"):
        read(["gs://photos/x.jpg"])
