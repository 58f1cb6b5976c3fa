"""Are the servers those that they should be, and who can reach what? Asked once, at a start.

Celery and the bus's clients would try for ever to connect to one whose certificate they do not
trust.
"""

from __future__ import annotations

import ipaddress
import socket

from pdtasks.errors import ConfigurationError
from pdtasks.settings import Settings
from pdtasks.tls import why_untrusted


def require_trusted(settings: Settings) -> None:
    """Return when each link that uses TLS is sound, or nobody answers there yet.

    Raises ConfigurationError, which says what to do.
    """
    links = [("BROKER_URL", settings.broker_url), ("BUS_URL", settings.bus_url)]
    links += [("BUS_URLS", url) for url in settings.bus_urls]
    links += [("KV_URLS", url) for url in settings.kv_urls]
    for name, url in links:
        if url and (why := why_untrusted(url)):
            raise ConfigurationError(f"PDTASKS_{name}: {why}")


def is_loopback(host: str) -> bool:
    """Can only this host reach what listens on `host`, an address or a name?"""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False  # unknown: better one warning too many
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def is_loopback_address(address: str) -> bool:
    """Is `address` one of this host's own, or `localhost`? Asks nobody."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
