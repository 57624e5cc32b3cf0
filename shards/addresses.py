"""Which addresses a URL from elsewhere may lead to: those of the public internet."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from linerate.shards.inspect_image import RejectedError

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_KINDS = ("loopback", "link_local", "multicast", "unspecified", "reserved", "private")

Address = tuple[int, Any]
"""(family, what socket.connect takes): resolved already, so that connecting asks no name server again."""


def resolve(host: str, port: int, *, allow_private: bool) -> list[Address]:
    """Where this host can be connected to.

    Raises RejectedError when one of its addresses is not public, and socket.gaierror when it has none. The
    caller must connect to what comes back: a name that is resolved twice may lead elsewhere the second time.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not allow_private:
        for *_, where in found:
            if kind := kind_of_address(str(where[0])):
                raise RejectedError(
                    "address refused", f"{host} is the {kind} address {where[0]}; --allow-private permits it"
                )
    return [(family, where) for family, _, _, _, where in found]


def kind_of_address(text: str) -> str | None:
    """Why this address is not public; None where it is."""
    address = ipaddress.ip_address(text)
    inner = _inner(address)
    if inner is not None:
        return kind_of_address(str(inner))
    for kind in _KINDS:
        if getattr(address, f"is_{kind}"):
            return kind.replace("_", "-")
    return None if address.is_global else "private"


def _inner(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
