"""What do finished requests leave behind? Nothing."""

from __future__ import annotations

from contextlib import suppress

from pdtasks.bus.presence import read_workers
from tests.integration.conftest import Services
from tests.waiting import wait_until


def wait_until_nothing_is_left(services: Services, *but: str) -> None:
    """No request has left anything on the bus or in the kv server."""

    def left() -> set[str]:
        keys = {
            key.decode() for server in (services.bus, services.kv) for key in server.scan_iter()
        }
        presence = ("pd:worker:", "pd:workers", "pd:api:", "pd:apis")
        return {k for k in keys - set(but) if not k.startswith(presence)}

    with suppress(AssertionError):
        wait_until(lambda: not left(), 5)
    found = left()
    assert not found, f"left behind: {found}"
    # nor in a worker
    wait_until(lambda: all(w.held == 0 for w in read_workers(services.bus)), 10)
