"""What of valkey-py do we rely on that it does not promise? By name, so that an upgrade says so."""

from __future__ import annotations

import inspect

from valkey._parsers import _RESP2Parser
from valkey.asyncio.connection import AbstractConnection as AsyncConnection
from valkey.cluster import NodesManager, ValkeyCluster
from valkey.connection import AbstractConnection, ConnectionPool


def test_a_connection_has_the_socket_on_which_blocks_travel() -> None:
    # kv/wire.py: the bulk bytes go around valkey-py.
    assert "self._sock = " in inspect.getsource(AbstractConnection)


def test_a_pool_makes_connections_and_remembers_how() -> None:
    # kv/store.py makes its own; bus/connection.py changes a timeout.
    assert hasattr(ConnectionPool, "make_connection")
    assert "self.connection_kwargs = " in inspect.getsource(ConnectionPool.__init__)


def test_a_clusters_layout_can_be_asked_for_anew() -> None:
    # kv/store.py
    assert "self.nodes_manager = " in inspect.getsource(ValkeyCluster.__init__)
    assert hasattr(NodesManager, "initialize")


def test_the_parser_that_the_bench_compares_with_is_there() -> None:
    assert issubclass(_RESP2Parser, object)


def test_a_commands_timeout_in_an_event_loop_still_loses_cancellations() -> None:
    # Why the bound is around a command and not in valkey-py (ARCHITECTURE): when this is gone,
    # its own may do.
    assert "async_timeout" in inspect.getsource(
        AsyncConnection.send_packed_command
    ) or "wait_for" in inspect.getsource(AsyncConnection.send_packed_command)
