"""Addresses of servers: what one is, and to which pictures may be sent. Nothing here imports torch."""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 120.0  # seconds for one try of one request to a server, from connecting to the last byte


def is_remote(value: Any) -> bool:
    """Whether a value is the address of a server."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def check_url(url: str) -> str:
    """The address without a slash at its end. Raises ValueError for one that pictures must not be sent to.

    Plain http is for this machine alone: elsewhere anyone on the way could read the pictures and change the scores.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port  # the port is parsed when it is asked for
    except ValueError as error:
        raise ValueError(f"{url}: not an address ({error})") from error
    if not host or parts.query or parts.fragment or parts.username is not None or re.search(r"[\s\x00-\x1f]", url):
        raise ValueError(f"{url}: an address is https://HOST:PORT, with a path perhaps, and no user name, query or blank")
    if parts.scheme.lower() == "http" and not is_loopback(host):
        raise ValueError(f"{url}: plain http is for this machine alone; use https, or a tunnel to http://127.0.0.1:PORT")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or number alone, without asking any name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
