"""Which ports does a stack choose for itself?"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pdtasks.cluster import probes
from pdtasks.cluster.probes import free_ports


def test_ports_are_free_different_and_none_that_the_kernel_gives_to_others() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())

    ports = free_ports(50)

    assert len(set(ports)) == 50
    assert not [port for port in ports if low <= port <= high]
    for port in ports:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_one_that_is_taken_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        taken = server.getsockname()[1]
        asked = iter([taken, taken, 0])
        monkeypatch.setattr(probes, "_some_port", lambda: next(asked))

        (port,) = free_ports(1)

    assert port != taken
    assert next(asked, None) is None


@pytest.mark.parametrize("given", ["1024\t65535", "", "nonsense"])
def test_where_the_kernel_gives_all_or_does_not_tell_any_free_one_will_do(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "range"
    told.write_text(given)
    monkeypatch.setattr(probes, "Path", lambda _: told)

    (port,) = free_ports(1)
    assert port > 0
