"""URLs of images: which are allowed, what they are made of, and how they are shown without secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from linerate.shards.errors import UserError
from linerate.shards.inspect_image import RejectedError

# A plan's container of this name says that `path` is a whole URL.
URL_CONTAINER = "url:"
HTTP_PORTS = {"http": 80, "https": 443}
STORES = ("s3", "gs")
SCHEMES = (*HTTP_PORTS, *STORES)
MAX_URL_BYTES = 8192

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST = re.compile(r"(?P<host>[A-Za-z0-9_](?:[A-Za-z0-9_.-]*)|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{0,5}))?")
_CONTROL = re.compile(r"[\x00-\x20\x7f\\]")
# Bytes that may stand in a request line as they are; all others, blanks and non-ASCII, are percent-encoded.
_TARGET_SAFE = "%/:?&=+,;@!$'()*~[]|^{}\"<>`"


@dataclass(frozen=True)
class Url:
    """A URL taken apart."""

    scheme: str
    host: str
    """For s3 and gs the bucket. An IPv6 address has no brackets here."""
    port: int
    """0 for s3 and gs."""
    target: str
    """What an http request asks for, percent-encoded; for s3 and gs the object's name as it is."""
    userinfo: tuple[str, str] | None = None
    """Name and password of the URL itself; http only. Never shown, never sent to another origin."""

    @property
    def is_store(self) -> bool:
        return self.scheme in STORES

    @property
    def origin(self) -> str:
        """scheme://host:port, or scheme://bucket: whom a request goes to."""
        if self.is_store:
            return f"{self.scheme}://{self.host}"
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """host, or host:port where the port is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == HTTP_PORTS[self.scheme] else f"{host}:{self.port}"


def is_url(text: str) -> bool:
    """Does it begin with a scheme and `://`, allowed or not?"""
    return _SCHEME.match(text) is not None


def refuse_staging(out: Path | str, staging: Path | None) -> None:
    """Raise UserError where a folder is given that nothing would be put into."""
    if staging is not None and not is_url(str(out)):
        raise UserError(f"--staging {staging} is for an OUT at a URL, and {out} is a folder; leave it out")


def parse_url(text: str) -> Url:
    """The parts of a URL. Raises RejectedError("bad URL", ...) for what is none of the four schemes."""
    found = _SCHEME.match(text)
    if not found:
        raise RejectedError("bad URL", "it does not begin with a scheme such as https://")
    scheme = found[1].lower()
    if scheme not in SCHEMES:
        raise RejectedError("bad URL", f"the scheme {scheme[:32]} is none of {', '.join(SCHEMES)}")
    if len(text) > MAX_URL_BYTES:
        raise RejectedError("bad URL", f"{len(text)} characters, at most {MAX_URL_BYTES} are taken")
    rest = text[found.end() :]
    if scheme in STORES:
        bucket, _, name = rest.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket) or not name:
            raise RejectedError("bad URL", f"{scheme}://BUCKET/NAME is needed")
        return Url(scheme, bucket, 0, name)
    netloc, target = _split_netloc(rest)
    userinfo, at, hostport = netloc.rpartition("@")
    match = _HOST.fullmatch(_ascii_host(hostport))
    port = int((match and match["port"]) or HTTP_PORTS[scheme])
    if not match or not 0 < port < 65536:
        raise RejectedError("bad URL", "its host or port cannot be read")
    name, _, password = userinfo.partition(":")
    return Url(
        scheme,
        match["host"].strip("[]").lower(),
        port,
        quote(_path_of(target), safe=_TARGET_SAFE),
        (unquote(name), unquote(password)) if at else None,
    )


def without_userinfo(text: str) -> str:
    """The URL without a name and password, for keys and indices; what is no URL comes back as it is."""
    found = _SCHEME.match(text)
    if not found or found[1].lower() in STORES:
        return text
    netloc, target = _split_netloc(text[found.end() :])
    hostport = netloc.rpartition("@")[2]
    # A password with an unescaped slash ends the host too early: then nothing of it can be trusted.
    if not _HOST.fullmatch(_ascii_host(hostport)):
        return f"{found[0]}..."
    return f"{found[0]}{hostport}{target}"


def stored_url(text: str) -> str:
    """The URL as it may be stored and compared: no name, no password, no query, which may be signed."""
    plain = without_userinfo(text)
    found = _SCHEME.match(plain)
    if found and found[1].lower() not in STORES:
        plain = re.split(r"[?#]", plain, maxsplit=1)[0]
    return _CONTROL.sub("?", plain)


def show_url(text: str) -> str:
    """The URL as messages show it: as stored_url, and not too long."""
    plain = stored_url(text)
    return plain if len(plain) <= 200 else f"{plain[:197]}..."


def _path_of(target: str) -> str:
    path = target.partition("#")[0]
    return path if path.startswith("/") else f"/{path}"


def _split_netloc(rest: str) -> tuple[str, str]:
    end = re.search(r"[/?#]", rest)
    return (rest[: end.start()], rest[end.start() :]) if end else (rest, "")


def _ascii_host(hostport: str) -> str:
    if hostport.isascii():
        return hostport
    try:
        host, colon, port = hostport.partition(":")
        return host.encode("idna").decode() + colon + port
    except UnicodeError:
        return ""
