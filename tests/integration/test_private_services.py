"""Are the private RabbitMQ node and Valkey servers private, and gone when they are stopped?"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import kombu
import psutil
import pytest
import valkey

from pdtasks.cluster import rabbitmq as rabbitmq_module
from pdtasks.cluster import valkey as valkey_module
from pdtasks.cluster.probes import broker_accepts, free_ports, valkey_answers
from pdtasks.cluster.process import StartFailed, identify
from pdtasks.cluster.rabbitmq import RabbitNode, server_programs
from pdtasks.cluster.valkey import ValkeyServer

_LOOPBACK = {"127.0.0.1", "::1"}


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    # Not tmp_path: the path of a unix socket has to be short.
    with tempfile.TemporaryDirectory(prefix="pdtasks-test-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def node(directory: Path) -> Iterator[RabbitNode]:
    with RabbitNode(directory / "rabbitmq") as node:
        yield node


@pytest.fixture(scope="module")
def kv(directory: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(directory / "valkey", "kv") as server:
        yield server


@pytest.fixture(scope="module")
def bus(directory: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(directory / "valkey", "bus") as server:
        yield server


def _family(pids: list[int]) -> list[psutil.Process]:
    found = [psutil.Process(pid) for pid in pids]
    return [p for parent in found for p in (parent, *parent.children(recursive=True))]


def _listening(pids: list[int]) -> dict[int, str]:
    return {
        connection.laddr.port: connection.laddr.ip
        for process in _family(pids)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def _password(url: str) -> str:
    return url.partition("://")[2].rpartition("@")[0].partition(":")[2]


def _command_lines() -> str:
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


def _wait_until(
    condition: Callable[[], bool], alive: subprocess.Popen[bytes] | None = None
) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert alive is None or alive.poll() is None, "the supervisor ended"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


# -- RabbitMQ --------------------------------------------------------------------------------------


def test_every_port_of_the_node_is_on_loopback(node: RabbitNode) -> None:
    ports = _listening([process.pid for process in node.processes])

    # AMQP, management, Erlang's distribution, epmd
    assert len(ports) == 4, ports
    assert set(ports.values()) <= _LOOPBACK


def test_a_wrong_password_and_the_guest_account_are_refused(node: RabbitNode) -> None:
    wrong = node.url.replace(_password(node.url), "wrong")
    guest = node.url.replace(f"pdtasks:{_password(node.url)}", "guest:guest")

    assert broker_accepts(node.url)
    assert not broker_accepts(wrong)
    assert not broker_accepts(guest)


def test_no_command_line_on_the_host_shows_a_password(
    node: RabbitNode, kv: ValkeyServer, bus: ValkeyServer
) -> None:
    lines = _command_lines()

    assert "beam.smp" in lines
    for url in (node.url, kv.url, bus.url):
        assert len(_password(url)) >= 32
        assert _password(url) not in lines


def test_the_node_keeps_its_files_to_itself(node: RabbitNode, directory: Path) -> None:
    assert (directory / "rabbitmq").stat().st_mode & 0o777 == 0o700
    cookie = directory / "rabbitmq" / "home" / ".erlang.cookie"
    assert cookie.stat().st_mode & 0o777 == 0o400
    files = [path for path in (directory / "rabbitmq").rglob("*") if path.is_file()]
    assert not any(_password(node.url) in path.read_text(errors="replace") for path in files)


def test_jobs_may_stay_unacknowledged_for_two_hours(node: RabbitNode, directory: Path) -> None:
    # The generated configuration is what the node runs with, translated from ours.
    generated = list((directory / "rabbitmq" / "mnesia").parent.rglob("*.conf"))
    texts = [path.read_text() for path in generated]

    assert any("consumer_timeout = 7200000" in text for text in texts)


def test_flower_can_read_queue_lengths_from_the_management_api(node: RabbitNode) -> None:
    with kombu.Connection(node.url) as connection, connection.channel() as channel:
        queue = kombu.Queue(
            "lengths", durable=True, queue_arguments={"x-queue-type": "quorum"}, channel=channel
        )
        queue.declare()
        kombu.Producer(channel).publish({"n": 1}, routing_key="lengths")
        url = node.api_url.replace(f"pdtasks:{_password(node.url)}@", "") + "queues/pdtasks"
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, url, "pdtasks", _password(node.url))
        opener = urllib.request.build_opener(
            urllib.request.HTTPBasicAuthHandler(passwords), urllib.request.ProxyHandler({})
        )
        try:
            deadline = time.monotonic() + 20  # statistics come every 5 s
            while True:
                with opener.open(url, timeout=5) as response:
                    lengths = {q["name"]: q.get("messages") for q in json.load(response)}
                if lengths.get("lengths") == 1:
                    break
                assert time.monotonic() < deadline, lengths
                time.sleep(0.5)
        finally:
            queue.delete()


def test_services_end_with_a_killed_supervisor_and_queues_stay(directory: Path) -> None:
    # Given a supervisor in a process of its own, which started all three services
    note = directory / "started"
    home = directory / "killed"
    script = f"""
import time
from pathlib import Path
from pdtasks.cluster.rabbitmq import RabbitNode
from pdtasks.cluster.valkey import ValkeyServer
home = Path({str(home)!r})
parts = [RabbitNode(home / "rabbitmq"), ValkeyServer(home, "kv"), ValkeyServer(home, "bus")]
for part in parts:
    part.start()
pids = " ".join(str(p.pid) for part in parts for p in part.processes)
Path({str(note)!r}).write_text(parts[0].url + " " + pids)
time.sleep(300)
"""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as supervisor:
        _wait_until(lambda: note.exists() and len(note.read_text().split()) == 5, supervisor)
        first, *pids = note.read_text().split()
        processes = [identify(p.pid) for p in _family([int(pid) for pid in pids])]
        assert len(processes) >= 5  # beam and its helpers, epmd, two servers
        # and a message in a quorum queue
        with kombu.Connection(first) as connection, connection.channel() as channel:
            queue = kombu.Queue("kept", durable=True, queue_arguments={"x-queue-type": "quorum"})
            queue(channel).declare()
            options = {"confirm_publish": True}
            with kombu.Connection(first, transport_options=options) as confirming:
                kombu.Producer(confirming).publish(
                    {"n": 7}, routing_key="kept", delivery_mode=2, confirm_timeout=10
                )

        # When the supervisor is killed
        supervisor.kill()

    # Then nothing of it is left
    _wait_until(lambda: not any(process is not None and process.alive() for process in processes))

    # When the node starts again, on other ports and with another password
    with RabbitNode(home / "rabbitmq") as again:
        assert _password(again.url) != _password(first)
        # Then the old password is void, and the message is still there
        old = again.url.replace(_password(again.url), _password(first))
        assert not broker_accepts(old)
        with kombu.Connection(again.url) as connection, connection.channel() as channel:
            message = queue(channel).get(no_ack=True)
            assert message is not None
            assert message.payload == {"n": 7}
        processes = [identify(p.pid) for p in _family([p.pid for p in again.processes])]
        assert len(processes) >= 3

    # and a stop leaves no process either, epmd included
    assert not any(process is not None and process.alive() for process in processes)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq_module, "_is_start_script", lambda path: False)

    with pytest.raises(StartFailed) as failed:
        server_programs()

    assert "apt-get install --no-install-recommends rabbitmq-server" in str(failed.value)
    assert "PDTASKS_BROKER_URL" in str(failed.value)


def test_the_distributions_wrapper_is_never_taken_for_the_start_script() -> None:
    # It would call itself again and again under its other name.
    script, _ = server_programs()

    assert script.name == "rabbitmq-server"
    assert "su rabbitmq" not in script.read_text()


def test_a_node_that_cannot_start_shows_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_module, "_CONFIG", "no.such.option = 1\n")
    node = RabbitNode(tmp_path / "rabbitmq")

    with pytest.raises(StartFailed) as failed:
        node.start()

    assert "rabbitmq.log" in str(failed.value)
    assert "no.such.option" in str(failed.value)
    assert not any(process.running for process in node.processes)


# -- Valkey ----------------------------------------------------------------------------------------


def test_kv_is_a_socket_for_its_owner_and_nothing_else(kv: ValkeyServer, directory: Path) -> None:
    path = directory / "valkey" / "kv.sock"

    assert path.is_socket()
    assert path.stat().st_mode & 0o077 == 0
    assert _listening([kv.process.pid]) == {}


def test_the_bus_listens_on_loopback_only(bus: ValkeyServer) -> None:
    assert set(_listening([bus.process.pid]).values()) == {"127.0.0.1"}


def test_servers_refuse_a_wrong_password_and_none_at_all(
    kv: ValkeyServer, bus: ValkeyServer
) -> None:
    for url in (kv.url, bus.url):
        assert valkey_answers(url)
        assert not valkey_answers(url.replace(_password(url), "wrong"))
        assert not valkey_answers(url.replace(f":{_password(url)}@", ""))


def test_kv_evicts_and_the_bus_does_not(kv: ValkeyServer, bus: ValkeyServer) -> None:
    def options(server: ValkeyServer) -> dict[str, str]:
        with valkey.Valkey.from_url(server.url, decode_responses=True) as client:
            found: dict[str, str] = client.config_get("*")
            return found

    for server, policy in ((kv, "allkeys-lru"), (bus, "noeviction")):
        found = options(server)
        assert found["maxmemory-policy"] == policy
        assert int(found["maxmemory"]) > 0
        assert found["save"] == ""
        assert found["appendonly"] == "no"
        assert found["commandlog-request-larger-than"] == "-1"
        assert found["commandlog-reply-larger-than"] == "-1"


def test_kv_takes_values_as_big_as_a_block(kv: ValkeyServer) -> None:
    block = os.urandom(8 << 20)
    with valkey.Valkey.from_url(kv.url) as client:
        client.set("block", block)
        assert client.get("block") == block
        client.delete("block")


def test_a_home_too_deep_for_a_socket_gets_a_short_private_one(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path / ("deep" * 30), "kv")
    with server:
        folder = server.temporary
        assert folder is not None
        assert folder.stat().st_mode & 0o777 == 0o700
        assert valkey_answers(server.url)

    assert not folder.exists()


def test_a_stopped_server_leaves_no_process_and_no_socket(directory: Path) -> None:
    folder = directory / "stopped"
    with ValkeyServer(folder, "kv") as server:
        identity = server.process.identity
        assert identity.alive()

    assert not identity.alive()
    assert [path.name for path in folder.iterdir()] == ["valkey-kv.log"]


def test_a_home_with_blanks_and_quotes_works(directory: Path) -> None:
    with ValkeyServer(directory / 'my "home" 100%', "kv") as server:
        assert valkey_answers(server.url)


def test_a_taken_port_costs_another_attempt_only(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(
            valkey_module,
            "free_ports",
            lambda count: [port] if (port := next(ports, 0)) else free_ports(count),
        )

        with ValkeyServer(directory / "again", "bus") as server:
            assert valkey_answers(server.url)
