"""Many images at once from elsewhere: order, memory, patience, and the difference between one and all."""

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tests.shards.servers import FaultyServer, serve

from linerate.shards import remote
from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote import RemoteReader

OPTIONS = FetchOptions(timeout_s=2, retries=2, backoff_s=0.01, in_flight=8, allow_private=True)
FILES = {f"{i}.jpg": random.Random(i).randbytes(1000 + i) for i in range(200)}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serve(FILES) as running:
        yield running


def read(urls: list[str], options: FetchOptions = OPTIONS, *, max_bytes: int = 1 << 20) -> list[bytes | str]:
    """Bodies, or why there is none."""
    found: list[bytes | str] = []
    with RemoteReader(urls, options, max_bytes=max_bytes) as reader:
        for _ in urls:
            try:
                found.append(bytes(reader.next()))
            except RejectedError as error:
                found.append(str(error))
    return found


def test_bodies_come_in_order_and_no_more_requests_than_allowed_run_at_once(server: FaultyServer) -> None:
    server.pause_s = 0.002
    assert read([server.url(f"ok/{name}") for name in FILES]) == list(FILES.values())
    assert 2 <= server.most_at_once <= 8
    assert server.num_connections <= 8


@pytest.mark.parametrize("path", ["flaky/2/1.jpg", "busy/2/1.jpg"])
def test_what_fails_twice_is_had_at_the_third_try(server: FaultyServer, path: str) -> None:
    assert read([server.url(path)]) == [FILES["1.jpg"]]
    assert server.hits.total() == 3


def test_after_all_tries_the_reason_and_their_number_are_told(server: FaultyServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
    assert read([server.url("status/500/x"), server.url("drop/1.jpg"), nobody]) == [
        "unreachable: HTTP 500 after 3 tries",
        "unreachable: cut short (500 of 1001 bytes) after 3 tries",
        "unreachable: no connection (Connection refused) after 3 tries",
    ]


def test_what_is_so_for_good_is_asked_for_once(server: FaultyServer) -> None:
    urls = [server.url("ok/none.jpg"), "ftp://a.org/x", server.url("endless/x"), server.url("ok/1.jpg")]
    assert read(urls, max_bytes=1001) == [
        "not found: HTTP 404",
        "bad URL: the scheme ftp is none of http, https, s3, gs",
        "too many bytes: more than 1001",
        FILES["1.jpg"],
    ]
    assert server.hits.total() == 3


def test_the_longest_allowed_image_passes_and_one_byte_more_does_not(server: FaultyServer) -> None:
    urls = [server.url("chunked/1.jpg"), server.url("chunked/2.jpg")]
    assert read(urls, max_bytes=1001) == [FILES["1.jpg"], "too many bytes: more than 1001"]


def test_loopback_is_refused_unless_it_is_allowed(server: FaultyServer) -> None:
    assert read([server.url("ok/1.jpg")], FetchOptions()) == [
        "address refused: 127.0.0.1 is the loopback address 127.0.0.1; --allow-private permits it"
    ]


def test_a_host_that_failed_twice_is_tried_once(server: FaultyServer) -> None:
    urls = [server.url(f"status/500/{i}") for i in range(6)]
    with RemoteReader(urls, FetchOptions(**vars(OPTIONS) | {"in_flight": 1}), max_bytes=99) as reader:
        for _ in urls:
            with pytest.raises(RejectedError, match="HTTP 500"):
                reader.next()
    assert server.hits.total() == 2 * 3 + 4


def test_a_slow_image_does_not_stop_those_behind_it(server: FaultyServer) -> None:
    urls = [server.url("stall/x"), *(server.url(f"ok/{i}.jpg") for i in range(100))]
    options = FetchOptions(**vars(OPTIONS) | {"timeout_s": 0.5, "retries": 0})
    with RemoteReader(urls, options, max_bytes=9999) as reader:
        with pytest.raises(RejectedError, match="unreachable: timed out"):
            reader.next()
        assert server.hits.total() == 101


def test_bodies_wait_for_their_turn_where_memory_is_short(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GRANT_BYTES", 100)
    monkeypatch.setattr(remote, "MAX_HELD_BYTES", 4000)
    names = [f"{i}.jpg" for i in range(40)]
    with RemoteReader([server.url(f"chunked/{n}") for n in names], OPTIONS, max_bytes=9999) as reader:
        most = 0
        for name in names:
            assert reader.next() == FILES[name]
            most = max(most, reader._memory._used)
        assert reader._memory._used == 0
    assert most <= 4000 + 9999


def test_nothing_is_held_when_all_was_rejected_or_taken(server: FaultyServer) -> None:
    urls = [server.url(path) for path in ("ok/1.jpg", "ok/none.jpg", "endless/x", "drop/1.jpg", "ok/2.jpg")]
    with RemoteReader(urls, OPTIONS, max_bytes=2000) as reader:
        for _ in urls:
            try:
                reader.next()
            except RejectedError:
                continue
        assert reader._memory._used == 0


def test_leaving_early_waits_for_no_server(server: FaultyServer) -> None:
    urls = [server.url("ok/1.jpg"), *(server.url(f"stall/{i}") for i in range(7))]
    slow = FetchOptions(**vars(OPTIONS) | {"timeout_s": 30, "backoff_s": 30})
    started = time.monotonic()
    with RemoteReader(urls, slow, max_bytes=9999) as reader:
        reader.next()
        while server.hits.total() < 8:
            time.sleep(0.005)
    assert time.monotonic() - started < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("status/500/{}", "unreachable: HTTP 500"),
        ("status/403/{}", "forbidden: HTTP 403"),
        ("ok/none{}", "not found: HTTP 404"),
    ],
)
def test_when_all_of_the_first_64_fail_alike_it_is_an_outage(
    server: FaultyServer, path: str, said: str
) -> None:
    urls = [server.url(path.format(i)) for i in range(100)]
    options = FetchOptions(**vars(OPTIONS) | {"retries": 0})
    with RemoteReader(urls, options, max_bytes=9999) as reader:
        for _ in range(63):
            with pytest.raises(RejectedError):
                reader.next()
        with pytest.raises(UserError, match=f"64 images in a row could not be fetched.*{said}"):
            reader.next()


def test_an_outage_later_is_told_from_images_that_are_gone(server: FaultyServer) -> None:
    options = FetchOptions(**vars(OPTIONS) | {"retries": 0})
    gone = [server.url("ok/1.jpg"), *(server.url(f"ok/none{i}") for i in range(99))]
    assert read(gone, options)[1:] == ["not found: HTTP 404"] * 99
    down = [server.url("ok/1.jpg"), *(server.url(f"status/503/{i}") for i in range(99))]
    with pytest.raises(UserError, match="64 images in a row"):
        read(down, options)


def test_failures_of_several_kinds_are_no_outage(server: FaultyServer) -> None:
    options = FetchOptions(**vars(OPTIONS) | {"retries": 0})
    urls = [server.url(f"status/{500 + i % 2}/{i}") for i in range(99)]
    assert len(read(urls, options)) == 99


def test_a_small_task_is_an_outage_when_all_16_fail(server: FaultyServer) -> None:
    options = FetchOptions(**vars(OPTIONS) | {"retries": 0})
    with pytest.raises(UserError, match="16 images in a row"):
        read([server.url(f"status/503/{i}") for i in range(16)], options)
    assert len(read([server.url(f"status/503/{i}") for i in range(15)], options)) == 15


def test_messages_hold_no_password(server: FaultyServer) -> None:
    options = FetchOptions(**vars(OPTIONS) | {"retries": 0})
    urls = [server.url(f"status/403/{i}?sig=topsecret").replace("//", "//me:topsecret@") for i in range(64)]
    with pytest.raises(UserError) as caught:
        read(urls, options)
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("in_flight", 0, "--in-flight is 0; give 1 to 1024"),
        ("timeout_s", 0.0, "--timeout-s is 0.0; give seconds above 0"),
        ("retries", -1, "--retries is -1; give 0 or more"),
        ("backoff_s", -1.0, "--backoff-s is -1.0; give seconds"),
    ],
)
def test_options_that_make_no_sense_are_refused(field: str, value: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FetchOptions(**{field: value})  # type: ignore[arg-type]
