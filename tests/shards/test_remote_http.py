"""One image by HTTP from servers with every fault: what is for good, what may pass, what is refused."""

import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.shards.servers import FaultyServer, serve

from linerate.shards import addresses, remote_http
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote_http import HttpClient, RetryError
from linerate.shards.remote_url import parse_url

DATA = bytes(range(256)) * 40
OPTIONS = FetchOptions(timeout_s=0.2, allow_private=True)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with serve({"a.jpg": DATA, "empty.jpg": b""}) as running:
        yield running


@pytest.fixture
def client() -> Iterator[HttpClient]:
    made = HttpClient(OPTIONS)
    yield made
    made.close()


def get(client: HttpClient, text: str, *, max_bytes: int = 1 << 20) -> bytes:
    def grow(num_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise RejectedError("too many bytes")

    body = bytearray()
    client.get(parse_url(text), body, grow)
    return bytes(body)


@pytest.mark.parametrize("path", ["ok/a.jpg", "chunked/a.jpg", "once/a.jpg"])
def test_the_bytes_arrive_however_they_are_framed(
    server: FaultyServer, client: HttpClient, path: str
) -> None:
    assert get(client, server.url(path)) == DATA
    assert get(client, server.url(path)) == DATA


def test_an_empty_body_is_empty(server: FaultyServer, client: HttpClient) -> None:
    assert get(client, server.url("ok/empty.jpg")) == b""


def test_one_connection_serves_many_images_also_after_errors(client: HttpClient) -> None:
    with serve({"a.jpg": DATA}) as server:
        for path in ("ok/a.jpg", "ok/none.jpg", "status/503/x", "redirect/302?to=/ok/a.jpg", "chunked/a.jpg"):
            try:
                get(client, server.url(path))
            except (RejectedError, RetryError):
                continue
        assert server.num_connections == 1


def test_a_kept_connection_that_died_is_replaced(server: FaultyServer, client: HttpClient) -> None:
    assert [get(client, server.url(path)) for path in ("once/a.jpg", "long/a.jpg", "ok/a.jpg")] == [
        DATA,
        DATA[:-10],
        DATA,
    ]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("ok/none.jpg", "not found: HTTP 404"),
        ("status/410/x", "not found: HTTP 410"),
        ("status/401/x", "forbidden: HTTP 401"),
        ("status/403/x", "forbidden: HTTP 403"),
        ("status/451/x", "forbidden: HTTP 451"),
        ("status/418/x", "unreachable: HTTP 418"),
        ("status/302/x", "unreachable: HTTP 302"),
        ("endless/x", "too many bytes"),
        ("lie/2000000/x", "too many bytes"),
        ("loop/x", "redirected: more than 5 times"),
        ("redirect/302?to=ftp://a.org/x", "redirected: to ftp://a.org/x: the scheme ftp is none"),
        ("redirect/302?to=//[x", "redirected: to what is no URL"),
        ("redirect/302?to=file:///etc/passwd", "redirected: to file://...: the scheme file is none"),
        ("redirect/307?to=s3://bucket/x", "redirected: to s3://bucket/x; from http only http"),
    ],
)
def test_what_is_so_for_good_is_rejected(
    server: FaultyServer, client: HttpClient, path: str, reason: str
) -> None:
    with pytest.raises(RejectedError, match=reason):
        get(client, server.url(path))


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("status/500/x", "HTTP 500"),
        ("status/429/x", "HTTP 429"),
        ("drop/a.jpg", r"cut short .5120 of 10240 bytes"),
        ("short/a.jpg", "cut short"),
        ("lie/1000/x", "timed out"),
        ("stall/x", "timed out"),
        ("headers/x", "no HTTP answer"),
    ],
)
def test_what_may_pass_asks_for_another_try(
    server: FaultyServer, client: HttpClient, path: str, cause: str
) -> None:
    with pytest.raises(RetryError, match=cause):
        get(client, server.url(path))


def test_bytes_that_drip_do_not_hold_a_try_longer_than_six_time_outs(server: FaultyServer) -> None:
    client = HttpClient(FetchOptions(timeout_s=0.05, allow_private=True))
    started = time.monotonic()
    with pytest.raises(RetryError, match="timed out"):
        get(client, server.url("drip/x"))
    client.close()
    assert time.monotonic() - started < 2  # the server would go on for 5 s


def test_a_server_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch, client: HttpClient) -> None:
    with serve({}) as server, pytest.raises(RetryError) as caught:
        get(client, server.url("busy/9/x"))
    assert caught.value.pause_s == 0
    assert remote_http._judged(503, "7").pause_s == 7  # type: ignore[union-attr]
    assert remote_http._judged(503, "86400").pause_s == 60  # type: ignore[union-attr]
    assert remote_http._judged(503, "Wed, 21 Oct").pause_s == 0  # type: ignore[union-attr]


def test_nobody_listening_is_no_connection(client: HttpClient) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(RetryError, match=r"no connection .Connection refused"):
            get(client, f"http://127.0.0.1:{unused.getsockname()[1]}/x")


def test_a_host_without_an_address_is_a_name_not_resolved(client: HttpClient) -> None:
    with pytest.raises(RetryError, match="name not resolved"):
        get(client, "http://nowhere.invalid/x")


def test_loopback_is_not_even_connected_to(server: FaultyServer) -> None:
    client = HttpClient(FetchOptions())
    before = server.num_connections
    with pytest.raises(RejectedError, match=r"address refused: 127\.0\.0\.1 is the loopback address"):
        get(client, server.url("ok/a.jpg"))
    assert server.num_connections == before


@pytest.mark.parametrize("to", ["http://127.0.0.2:1/x", "http://169.254.169.254/latest/meta-data"])
def test_a_redirect_into_the_private_network_is_refused(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    ours = ("127.0.0.1",)
    judge = addresses.kind_of_address
    monkeypatch.setattr(addresses, "kind_of_address", lambda text: None if text in ours else judge(text))
    client = HttpClient(FetchOptions())
    with pytest.raises(RejectedError, match="address refused"):
        get(client, server.url(f"redirect/302?to={to}"))
    client.close()


def test_the_connection_goes_to_the_address_that_was_checked(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, port: int, **kwargs: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "192.0.2.1", port, **kwargs)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", rebinding)
    client = HttpClient(OPTIONS)
    assert get(client, server.url("ok/a.jpg", host="rebind.test")) == DATA
    client.close()
    assert asked == ["rebind.test"]


def test_a_name_and_password_go_to_their_own_host_and_nowhere_else(client: HttpClient) -> None:
    with serve({"a.jpg": DATA}) as other, serve({}) as first:
        where = first.url(f"redirect/302?to={other.url('ok/a.jpg').replace('://', '://x:y@')}")
        assert get(client, where.replace("://", "://me:secret@")) == DATA
        assert first.authorizations == ["Basic bWU6c2VjcmV0"]
        assert other.authorizations == [None]


def test_a_certificate_that_nobody_signed_is_rejected(client: HttpClient, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(tmp_path))
    with serve({"a.jpg": DATA}, context=context) as server:
        where = server.url("ok/a.jpg", scheme="https")
        with pytest.raises(RejectedError, match="unreachable: its certificate: self-signed"):
            get(client, where)
        client._tls = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        client._options = FetchOptions(timeout_s=5, allow_private=True)
        assert get(client, where) == DATA


def _certificate(folder: Path) -> Path:
    """A self-signed certificate with its key, for 127.0.0.1."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "cert.pem"
    path.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()) + made.public_bytes(pem))
    return path
