"""Does a block store find its blocks in a Valkey Cluster, whatever becomes of nodes and slots?"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import valkey
from valkey.crc import key_slot

from pdtasks.cluster.probes import free_ports, valkey_answers
from pdtasks.cluster.process import Process
from pdtasks.cluster.valkey import ValkeyServer, server_program
from pdtasks.kv.store import StoreError
from tests.integration.store_calls import BLOCK, MIB, MakeStore, calls, get, has, put
from tests.waiting import wait_until

NUM_SLOTS = 16384
PASSWORD = "cluster-password"


@dataclass
class Node:
    """A node of a cluster."""

    process: Process
    port: int
    bus_port: int

    @property
    def url(self) -> str:
        return f"valkey://:{PASSWORD}@127.0.0.1:{self.port}"

    def ask(self, *command: object) -> Any:
        with valkey.Valkey.from_url(self.url) as client:
            return client.execute_command(*command)

    @property
    def name(self) -> str:
        return str(self.ask("CLUSTER MYID").decode())

    def sees(self, num_nodes: int) -> bool:
        """Does it know that many nodes, and that all is well?"""
        if not valkey_answers(self.url):
            return False
        info = self.ask("CLUSTER INFO")
        return bool(
            info["cluster_state"] == "ok"
            and info["cluster_known_nodes"] == str(num_nodes)
            and info["cluster_slots_ok"] == str(NUM_SLOTS)
        )


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Three nodes, each with a third of the slots."""
    started = []
    try:
        for number in range(3):
            folder = tmp_path_factory.mktemp(f"node{number}")
            port, bus_port = free_ports(2)
            options = {
                "bind": "127.0.0.1",
                "port": port,
                "dir": folder,
                "save": '""',
                "requirepass": PASSWORD,
                "cluster-enabled": "yes",
                "cluster-port": bus_port,
                "cluster-node-timeout": 2000,
                "cluster-require-full-coverage": "no",
            }
            process = Process(
                f"node {number}",
                [str(server_program()), "-"],
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                log=folder / "log",
                stdin="".join(f"{name} {value}\n" for name, value in options.items()),
                cwd=folder,
            )
            process.start()
            started.append(Node(process, port, bus_port))
        bounds = [NUM_SLOTS * i // 3 for i in range(4)]
        for number, node in enumerate(started):
            wait_until(partial(valkey_answers, node.url))
            node.ask("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            node.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in started[1:]:
            started[0].ask("CLUSTER MEET", "127.0.0.1", node.port, node.bus_port)
        wait_until(lambda: all(n.sees(3) for n in started), 30, "the cluster agrees")
        yield started
    finally:
        for node in started:
            node.process.kill()


@pytest.fixture
def cluster(nodes: list[Node]) -> list[Node]:
    """The nodes, empty."""
    for node in nodes:
        node.ask("FLUSHALL")
    return nodes


def owner_of(nodes: list[Node], key: str) -> Node:
    """The node that has `key`, as the first of `nodes` sees it."""
    slot = key_slot(key.encode())
    for first, last, primary, *_ in nodes[0].ask("CLUSTER SLOTS"):
        if first <= slot <= last:
            return next(node for node in nodes if node.port == primary[1])
    raise AssertionError(f"nobody has slot {slot}")


def all_say(nodes: list[Node], key: str, owner: Node) -> bool:
    """Do the nodes agree on who has `key`?"""
    return all(owner_of([node, *nodes], key) is owner for node in nodes)


def name_on(nodes: list[Node], owner: Node) -> str:
    """A name that lives there."""
    names = (f"pd:kv:{number}" for number in itertools.count())
    return next(name for name in names if owner_of(nodes, name) is owner)


def test_blocks_are_spread_over_a_cluster_and_found(
    cluster: list[Node], make_store: MakeStore
) -> None:
    store = make_store(f"cluster+{cluster[0].url}")
    names = [f"pd:kv:{number}" for number in range(50)]

    for name in names:
        put(store, name, name.encode(), BLOCK)

    # Whichever node is named
    other = make_store(f"cluster+{cluster[2].url}")
    for name in names:
        assert get(other, name, len(name) + MIB) == name.encode() + BLOCK
    assert other.touch([*names, "pd:kv:never"]) == [True] * 50 + [False]
    sizes = [node.ask("DBSIZE") for node in cluster]
    assert sum(sizes) == 50
    assert min(sizes) >= 5
    other.delete(names)
    assert [node.ask("DBSIZE") for node in cluster] == [0, 0, 0]


def test_a_cluster_whose_node_stands_still_costs_no_more_than_the_deadline(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given a store that has to ask for the layout, of a node that answers nothing
    store = make_store(f"cluster+{cluster[0].url}", timeout_s=10)
    os.kill(cluster[0].process.pid, signal.SIGSTOP)
    try:

        def ask(number: int) -> float:
            began = time.monotonic()
            with pytest.raises(StoreError):
                store.get(f"pd:kv:{number}", [memoryview(bytearray(3))], time.monotonic() + 0.5)
            return time.monotonic() - began

        # Then several threads wait side by side, each within its deadline
        with ThreadPoolExecutor(4) as threads:
            assert max(threads.map(ask, range(8))) < 1.5
    finally:
        os.kill(cluster[0].process.pid, signal.SIGCONT)


def test_a_node_that_stands_still_does_not_hold_up_the_blocks_of_others(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given a store that knows the layout, and would ask the node that stands still first
    frozen, other, _ = cluster
    gone, kept = name_on(cluster, frozen), name_on(cluster, other)
    store = make_store(f"cluster+{frozen.url}", timeout_s=10)
    servers = cast("Any", store._servers)
    for name in (gone, kept):
        put(store, name, b"x")
    os.kill(frozen.process.pid, signal.SIGSTOP)
    try:

        def is_lost() -> bool:
            with pytest.raises(StoreError):
                store.get(gone, [memoryview(bytearray(1))], time.monotonic() + 0.2)
            return bool(servers._outdated)

        wait_until(is_lost)

        # When it looks for whoever has taken that node's place
        began = time.monotonic()
        for _ in range(20):
            deadline = time.monotonic() + 3
            assert store.get(kept, [memoryview(bytearray(1))], deadline)

        # Then those of the others are had meanwhile
        assert time.monotonic() - began < 3
        assert servers._outdated
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
        wait_until(lambda: all(node.sees(3) for node in cluster), 30, "the node is back")


def test_connections_to_a_node_that_was_replaced_are_closed(
    cluster: list[Node], make_store: MakeStore
) -> None:
    store = make_store(f"cluster+{cluster[0].url}")
    for number in range(20):
        put(store, f"pd:kv:{number}", b"abc")
    before = set(store._connections)

    # When the layout is asked for anew, and names other clients for the same nodes
    servers = cast("Any", store._servers)
    for node in servers._cluster.get_nodes():
        node.valkey_connection = None
    servers._cluster.nodes_manager.nodes_cache = {}
    servers._outdated = True
    for number in range(20):
        assert get(store, f"pd:kv:{number}", 3) == b"abc"

    assert not before & store._connections
    assert len(store._connections) <= len(cluster)


def test_threads_use_a_cluster_side_by_side(cluster: list[Node], make_store: MakeStore) -> None:
    store = make_store(f"cluster+{cluster[0].url}")

    def round_trip(number: int) -> bool:
        value = number.to_bytes(4, "little") * 50_000
        put(store, f"pd:kv:{number}", value)
        return get(store, f"pd:kv:{number}", len(value)) == value

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(round_trip, range(40)))
    assert len(store._connections) <= 4 * 3


def test_a_slot_that_moves_costs_its_blocks_and_never_gives_a_wrong_one(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given stores that know where a block is
    key, neighbour = "pd:kv:{moves}:1", "pd:kv:{moves}:2"
    store, reader, prober = (make_store(f"cluster+{cluster[0].url}") for _ in range(3))
    put(store, key, BLOCK)
    assert get(reader, key, MIB) == BLOCK
    assert has(prober, key)
    slot, old = key_slot(key.encode()), owner_of(cluster, key)
    new = next(node for node in cluster if node is not old)

    # While its slot is about to move, what is there stays and what is not there is refused
    new.ask("CLUSTER SETSLOT", slot, "IMPORTING", old.name)
    old.ask("CLUSTER SETSLOT", slot, "MIGRATING", new.name)
    assert get(store, key, MIB) == BLOCK
    with pytest.raises(StoreError, match="ASK"):
        put(store, neighbour, BLOCK)

    # When it has moved
    old.ask("DEL", key)
    for node in (new, old):
        node.ask("CLUSTER SETSLOT", slot, "NODE", new.name)
    wait_until(lambda: all_say(cluster, key, new))
    new.ask("SET", neighbour, b"new")

    # Then whoever asks the old node hears of it, once
    first_calls: list[Callable[[], object]] = [
        lambda: get(store, neighbour, 3),
        lambda: get(reader, neighbour, 3),
        lambda: has(prober, neighbour),
    ]
    for call in first_calls:
        with contextlib.suppress(StoreError):
            assert call() in (b"new", True)
    assert get(store, neighbour, 3) == get(reader, neighbour, 3) == b"new"
    assert has(prober, neighbour)
    assert get(store, key, MIB) is None
    put(store, key, BLOCK)
    assert get(reader, key, MIB) == BLOCK
    reader.delete([key, neighbour])
    assert new.ask("DBSIZE") == 0


def test_a_lost_node_takes_its_own_blocks_alone_until_another_has_its_place(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given a store that was told of the node that will be lost, and of no other
    lost, other, third = cluster
    gone, kept = name_on(cluster, lost), name_on(cluster, other)
    store = make_store(f"cluster+{lost.url}", timeout_s=1.0)
    for name in (gone, kept):
        put(store, name, b"x")

    lost.process.kill()
    try:
        for _ in range(2):
            with pytest.raises(StoreError):
                get(store, gone, 1)
            with pytest.raises(StoreError):
                has(store, gone)
            assert get(store, kept, 1) == b"x"
            assert has(store, kept)

        # When another takes its place, of which no node that is left tells
        for node in (other, third):
            node.ask("CLUSTER SETSLOT", key_slot(gone.encode()), "NODE", other.name)
        other.ask("CLUSTER BUMPEPOCH")  # its word counts more than that of the lost one

        # Then the store finds that out
        def works() -> bool:
            with contextlib.suppress(StoreError):
                return get(store, gone, 1) is None
            return False

        wait_until(works)
        put(store, gone, b"y")
        assert other.ask("GET", gone) == b"y"
    finally:
        lost.process.start()
        wait_until(lambda: all(node.sees(3) for node in cluster), 30, "the node is back")
    wait_until(lambda: all_say(cluster, gone, other))

    # and the node that is back is as good as the others
    back = name_on(cluster, lost)
    put(store, back, b"z")
    assert get(store, back, 1) == b"z"
    assert get(store, gone, 1) == b"y"


def test_no_cluster_at_all_is_an_error(own_server: ValkeyServer, make_store: MakeStore) -> None:
    (port,) = free_ports(1)
    for url in (own_server.url, f"valkey://127.0.0.1:{port}", "unix:///nowhere"):
        for call in calls(make_store(f"cluster+{url}", timeout_s=1.0)):
            with pytest.raises(StoreError):
                call()
