"""URLs: the four schemes, nothing of a password shown, and no way into the private network."""

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linerate.shards import addresses
from linerate.shards.addresses import kind_of_address, resolve
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote_url import MAX_URL_BYTES, is_url, parse_url, show_url, without_userinfo


@pytest.mark.parametrize(
    ("text", "origin", "target"),
    [
        ("http://a.org/x/y.jpg?v=1#top", "http://a.org", "/x/y.jpg?v=1"),
        ("HTTPS://A.org:443", "https://a.org", "/"),
        ("http://a.org?x", "http://a.org", "/?x"),
        ("http://a.org:8080/a b/\u00e9.jpg", "http://a.org:8080", "/a%20b/%C3%A9.jpg"),
        ("http://a.org/100%25.jpg", "http://a.org", "/100%25.jpg"),
        ("http://[::1]:80/x", "http://[::1]", "/x"),
        ("http://b\u00fccher.de/x", "http://xn--bcher-kva.de", "/x"),
        ("s3://bucket/a b?#@.jpg", "s3://bucket", "a b?#@.jpg"),
        ("gs://bucket/a", "gs://bucket", "a"),
    ],
)
def test_a_url_comes_apart(text: str, origin: str, target: str) -> None:
    url = parse_url(text)
    assert (url.origin, url.target, url.userinfo) == (origin, target, None)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("cat.jpg", "does not begin with a scheme"),
        ("file:///etc/passwd", "scheme file is none of http, https, s3, gs"),
        ("gopher://a.org/x", "scheme gopher is none"),
        ("http://", "host or port"),
        ("http:///x", "host or port"),
        ("http://a.org:99999/x", "host or port"),
        ("http://a.org:0/x", "host or port"),
        ("http://a\\b/x", "host or port"),
        ("http://a.org\r\nX: y/x", "host or port"),
        ("http://\u2488.\ud800/x", "host or port"),
        ("s3://bucket", "s3://BUCKET/NAME"),
        ("s3://bucket/", "s3://BUCKET/NAME"),
        ("gs://user@bucket/x", "gs://BUCKET/NAME"),
        ("http://a.org/" + "x" * MAX_URL_BYTES, "at most 8192"),
    ],
)
def test_a_bad_url_is_rejected_with_its_rule(text: str, detail: str) -> None:
    with pytest.raises(RejectedError, match="bad URL") as caught:
        parse_url(text)
    assert detail in caught.value.detail


def test_no_control_character_reaches_a_request() -> None:
    assert parse_url("http://a.org/x\r\nEvil: 1\x00\x7f").target == "/x%0D%0AEvil:%201%00%7F"
    assert parse_url("http://a.org?a\r\nEvil: \xe9#b").target == "/?a%0D%0AEvil:%20%C3%A9"
    assert parse_url("http://a.org#b").target == "/"


def test_userinfo_is_kept_apart_and_never_shown() -> None:
    text = "https://me:p%40ss@a.org:8443/x.jpg?Signature=abc"
    assert parse_url(text).userinfo == ("me", "p@ss")
    assert "me" not in parse_url(text).origin
    assert without_userinfo(text) == "https://a.org:8443/x.jpg?Signature=abc"
    assert show_url(text) == "https://a.org:8443/x.jpg"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:p/w@a.org/x", "http://..."),  # the slash ends the host too early
        ("http://a.org/@me/x", "http://a.org/@me/x"),
        ("s3://bucket/a@b?.jpg", "s3://bucket/a@b?.jpg"),
        ("dir/cat.jpg", "dir/cat.jpg"),
        ("http://a.org/\x1b[2J", "http://a.org/?[2J"),
        ("http://a.org/" + "x" * 300, "http://a.org/" + "x" * 184 + "..."),
    ],
)
def test_what_is_shown_of_a_url(text: str, shown: str) -> None:
    assert show_url(text) == shown


def test_a_url_is_told_from_a_path_by_its_scheme() -> None:
    assert [is_url(text) for text in ("s3://b/x", "x://y", "a/b", "/a:b", "C:/x")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00:ec2::254", "private"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::a9fe:a9fe", "link-local"),
        ("2002:7f00:1::", "loopback"),
        ("93.184.215.14", None),
        ("2606:4700::1111", None),
        ("64:ff9b::5db8:d70e", None),
    ],
)
def test_only_public_addresses_pass_in_every_disguise(address: str, kind: str | None) -> None:
    assert kind_of_address(address) == kind


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "::1"])
def test_every_spelling_of_loopback_is_refused(host: str) -> None:
    with pytest.raises(RejectedError, match=r"address refused: .* is the loopback address .*--allow-private"):
        resolve(host, 80, allow_private=False)


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(host: str, port: int, **kwargs: Any) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("93.184.215.14", "10.0.0.1")
        ]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", answers)
    with pytest.raises(RejectedError, match="private address 10"):
        resolve("a.org", 80, allow_private=False)
    assert resolve("a.org", 80, allow_private=True)[1] == (socket.AF_INET, ("10.0.0.1", 80))


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://", "s3://", "gs://", "ftp://"]))
def test_any_text_is_a_url_or_a_reject_and_can_be_shown(text: str, scheme: str) -> None:
    show_url(scheme + text)
    try:
        url = parse_url(scheme + text)
    except RejectedError:
        return
    if not url.is_store:
        line = f"{url.target} {url.authority}"
        assert line.isascii()
        assert line.isprintable()
        assert " " not in url.target


@given(
    st.text(alphabet="abc123:@%._-", min_size=1, max_size=12),
    st.sampled_from(["a.org/x.jpg", "a.org:8080/?q=1", "[2606:4700::1111]/x"]),
)
def test_no_userinfo_is_ever_shown(userinfo: str, rest: str) -> None:
    shown = show_url(f"https://{userinfo}@{rest}")
    assert shown == f"https://{rest.partition('?')[0]}"
    assert parse_url(f"https://{userinfo}@{rest}").userinfo is not None
