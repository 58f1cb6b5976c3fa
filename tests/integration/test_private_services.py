"""Are the private RabbitMQ node and Valkey servers private, and gone when they are stopped?"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import kombu
import psutil
import pytest
import valkey

from pdtasks.cluster import rabbitmq as rabbitmq_module
from pdtasks.cluster import valkey as valkey_module
from pdtasks.cluster.children import stack_urls
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import (
    broker_accepts,
    free_ports,
    valkey_answers,
    valkey_takes_writes,
)
from pdtasks.cluster.process import StartFailed
from pdtasks.cluster.rabbitmq import RabbitNode, server_programs
from pdtasks.cluster.rights import User
from pdtasks.cluster.services import Services
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.kv.keys import block_key, tail_key
from pdtasks.running_stack import identify
from pdtasks.settings import make_settings

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


def _without_user(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


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
    for url in (node.url, kv.url, kv.operator_url, bus.url):
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
    operator = kombu.Connection(node.operator_url)
    with operator as connection, connection.channel() as channel:
        queue = kombu.Queue(
            "lengths", durable=True, queue_arguments={"x-queue-type": "quorum"}, channel=channel
        )
        queue.declare()
        kombu.Producer(channel).publish({"n": 1}, routing_key="lengths")
        user = User.FLOWER
        password = _password(node.url_for(user))
        url = node.api_url_for(user).replace(f"{user}:{password}@", "") + "queues/pdtasks"
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, url, user, password)
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
Path({str(note)!r}).write_text(parts[0].operator_url + " " + pids)
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
        assert _password(again.operator_url) != _password(first)
        # Then the old password is void, and the message is still there
        old = again.operator_url.replace(_password(again.operator_url), _password(first))
        assert not broker_accepts(old)
        with kombu.Connection(again.operator_url) as connection, connection.channel() as channel:
            message = queue(channel).get(no_ack=True)
            assert message is not None
            assert message.payload == {"n": 7}
        processes = [identify(p.pid) for p in _family([p.pid for p in again.processes])]
        assert len(processes) >= 3

        # and a stop leaves no process either, epmd included
        again.stop()
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
        assert not valkey_answers(_without_user(url))


def test_what_the_store_does_the_workers_user_may(kv: ValkeyServer) -> None:
    for key in (block_key("0123456789abcdef", 0, b"hash"), tail_key("transfer", 0)):
        with valkey.Valkey.from_url(kv.url) as worker:
            assert worker.set(key, b"block", ex=60)
            assert worker.get(key) == b"block"
            assert "used_memory" in cast("dict[str, Any]", worker.info())
            with worker.pipeline(transaction=False) as batch:
                batch.expire(key, 30).unlink(key).delete(key)
                assert batch.execute() == [True, 1, 0]


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "FLUSHDB",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "KEYS *",
        "SCAN 0",
        "RANDOMKEY",
        "DBSIZE",
        "MONITOR",
        "SHUTDOWN",
        "CLIENT LIST",
        "ACL LIST",
        "ACL SETUSER pdtasks +@all",
        "EVAL return(1) 0",
        "SELECT 1",
        "SUBSCRIBE channel",
        "PUBLISH channel message",
        "GET elsewhere",
        "SET elsewhere value",
        "EXPIRE elsewhere 1",
        "UNLINK pd:kv:block elsewhere",
        "DEL pd:kvelsewhere",
        "GET pd:reply:stream",
    ],
)
def test_nothing_else_may_the_workers_user_do(kv: ValkeyServer, command: str) -> None:
    with (
        valkey.Valkey.from_url(kv.url) as worker,
        pytest.raises(valkey.exceptions.NoPermissionError),
    ):
        worker.execute_command(*command.split())


def test_a_worker_that_connects_is_refused_nothing(kv: ValkeyServer) -> None:
    # A refusal that valkey-py swallows still takes a place in the server's list of refusals.
    with valkey.Valkey.from_url(kv.operator_url) as operator:
        operator.acl_log_reset()
        with valkey.Valkey.from_url(kv.url) as worker:
            assert worker.ping()

        assert operator.acl_log() == []


def test_the_default_user_of_kv_is_off(kv: ValkeyServer) -> None:
    place = kv.url.rpartition("@")[2]
    for user in ("", "default@", "default:@", f":{_password(kv.url)}@"):
        with (
            valkey.Valkey.from_url(f"unix://{user}{place}") as nobody,
            pytest.raises(valkey.AuthenticationError),
        ):
            nobody.ping()


def test_the_operator_sees_what_a_worker_may_not(kv: ValkeyServer) -> None:
    assert _password(kv.operator_url) != _password(kv.url)
    with (
        valkey.Valkey.from_url(kv.url) as worker,
        valkey.Valkey.from_url(kv.operator_url) as operator,
    ):
        worker.set("pd:kv:seen", b"x")
        assert b"pd:kv:seen" in set(operator.scan_iter())
        operator.flushall()
        assert worker.get("pd:kv:seen") is None


def test_each_child_of_a_stack_gets_its_own_user_and_no_more(directory: Path) -> None:
    # Given a stack that starts its own Valkey servers
    settings = make_settings(
        home=directory / "stack",
        broker_url="amqp://elsewhere",
        broker_api_url="http://elsewhere",
        bus_url=None,  # whatever other tests have put into the environment
        kv_urls=(),
    )
    services = Services(Console(), lambda: None)
    try:
        # When
        settings = services.start(settings)

        # Then what every child gets is one thing, and the operator's URLs another
        operator_urls = services.operator_urls()
        assert set(operator_urls) == {"bus", "kv"}
        for url in operator_urls.values():
            assert valkey_answers(url)
        assert "operator" not in json.dumps(stack_urls(settings, flower=True))
        env = {user: services.settings_for(user, settings).to_env() for user in User}
        for of_one in (settings.to_env(), *env.values()):
            assert not [url for url in operator_urls.values() if _password(url) in str(of_one)]
        assert env[User.WORKER]["PDTASKS_BUS_URL"].startswith("valkey://pdtasks-worker:")
        assert env[User.WORKER]["PDTASKS_KV_URLS"].startswith("unix://pdtasks:")
        assert env[User.API]["PDTASKS_BUS_URL"].startswith("valkey://pdtasks-api:")
        # and nobody what it does not use (empty: it is not looked for elsewhere)
        assert env[User.API]["PDTASKS_KV_URLS"] == ""
        assert env[User.FLOWER]["PDTASKS_KV_URLS"] == env[User.FLOWER]["PDTASKS_BUS_URL"] == ""
        assert env[User.FLOWER]["PDTASKS_BROKER_API_URL"] == "http://elsewhere"
        assert env[User.API]["PDTASKS_BROKER_API_URL"] == ""
        assert env[User.WORKER]["PDTASKS_BROKER_API_URL"] == ""
        assert env[User.BALANCER]["PDTASKS_BUS_URL"].startswith("valkey://pdtasks-balancer:")
        for name in ("PDTASKS_BROKER_URL", "PDTASKS_KV_URLS"):
            assert env[User.BALANCER][name] == ""
    finally:
        services.close()


def test_passwords_of_kv_change_with_each_start_and_are_in_no_file(directory: Path) -> None:
    folder = directory / "secrets"
    server = ValkeyServer(folder, "kv")
    seen: set[str] = set()
    for _ in range(2):
        with server:
            seen |= {_password(server.url), _password(server.operator_url)}
            # Given a refusal, of which the log might tell
            assert not valkey_answers(_without_user(server.url))

    assert len(seen) == 4
    texts = [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
    assert texts
    assert not any(password in text for password in seen for text in texts)


def test_kv_evicts_and_the_bus_does_not(kv: ValkeyServer, bus: ValkeyServer) -> None:
    def options(server: ValkeyServer) -> dict[str, str]:
        with valkey.Valkey.from_url(server.operator_url, decode_responses=True) as client:
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


def test_a_full_bus_answers_but_takes_no_writes(directory: Path) -> None:
    with (
        ValkeyServer(directory / "full", "bus", maxmemory=4 << 20) as server,
        valkey.Valkey.from_url(server.url) as client,
        valkey.Valkey.from_url(server.operator_url) as operator,
    ):
        assert valkey_takes_writes(client)

        with contextlib.suppress(valkey.ValkeyError):
            for number in range(100_000):
                operator.set(f"n{number}", bytes(64))

        assert valkey_answers(server.url)
        assert not valkey_takes_writes(client)


@pytest.mark.parametrize("durable", [True, False])
def test_what_a_durable_server_has_outlives_its_death(directory: Path, durable: bool) -> None:
    with ValkeyServer(directory / f"durable-{durable}", "bus", durable=durable) as server:
        url, operator = server.url, server.operator_url
        with valkey.Valkey.from_url(operator) as client:
            client.set("kept", "x")
        server.process.kill()

        server.restart()

        assert server.url == url
        with valkey.Valkey.from_url(operator) as client:
            assert client.get("kept") == (b"x" if durable else None)


def test_a_service_that_dies_is_started_in_its_place_with_what_it_had(directory: Path) -> None:
    output = io.StringIO()
    settings = make_settings(
        home=directory / "again",
        broker_url="amqp://elsewhere",
        bus_url=None,  # whatever other tests have put into the environment
        kv_urls=("valkey://elsewhere",),
    )
    services = Services(Console(output), lambda: None)
    try:
        url = services.start(settings).require_bus()
        operator = services.operator_urls()["bus"]
        (bus,) = services.members()
        with valkey.Valkey.from_url(operator) as client:
            client.set("kept", "x")

        def noticed(number: int) -> bool:
            services.check()
            return output.getvalue().count("is back after") == number

        for number in range(1, 6):
            os.kill(services.members()[0].pid, signal.SIGKILL)
            _wait_until(partial(noticed, number))
            with valkey.Valkey.from_url(operator) as client:
                assert client.get("kept") == b"x"
        assert services.operator_urls()["bus"] == operator
        assert services.members()[0].pid != bus.pid
        assert url.rpartition("@")[2] == operator.rpartition("@")[2]

        os.kill(services.members()[0].pid, signal.SIGKILL)
        with pytest.raises(StartFailed, match=r"ended by itself .*, 6 times in 10 min"):
            _wait_until(partial(noticed, 6))
    finally:
        services.close()


def test_kv_takes_values_as_big_as_a_block(kv: ValkeyServer) -> None:
    block = os.urandom(8 << 20)
    with valkey.Valkey.from_url(kv.url) as client:
        client.set("pd:kv:block", block)
        assert client.get("pd:kv:block") == block
        client.delete("pd:kv:block")


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
