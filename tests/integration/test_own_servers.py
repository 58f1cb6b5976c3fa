"""Servers of one's own, set up as docs/security.md says, and every link over TLS."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shlex import split
from urllib.parse import urlsplit

import httpx
import kombu
import pytest
import valkey
from click.testing import CliRunner

from pdtasks.bus.presence import read_workers
from pdtasks.cli import main
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import free_ports
from pdtasks.cluster.process import StartFailed
from pdtasks.cluster.rabbitmq import RabbitNode
from pdtasks.cluster.rights import BROKER_RIGHTS, KV_RIGHTS, User
from pdtasks.cluster.services import Services as StackServices
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.settings import load_settings, make_settings
from pdtasks.tls import amqp_arguments, valkey_url
from tests.certificates import Certificate, make_certificate
from tests.integration.conftest import ROOT, Nursery, StartWorker, StubWorker
from tests.manual import commands
from tests.tls_front import TlsFront
from tests.waiting import wait_until

_TLS_CONF = """\
listeners.ssl.default = 127.0.0.1:{port}
ssl_options.cacertfile = {certificate.file}
ssl_options.certfile = {certificate.file}
ssl_options.keyfile = {certificate.key}
ssl_options.verify = verify_none
ssl_options.fail_if_no_peer_cert = false
"""


def password_of(user: User) -> str:
    return f"password-of-{user}"


@dataclass(frozen=True)
class OwnServers:
    """All three, over TLS."""

    node: RabbitNode
    bus: ValkeyServer
    certificate: Certificate
    ports: dict[str, int]

    def env(self, user: User, trusted: Path | None = None) -> dict[str, str]:
        """For a process of `user`, which trusts a certificate."""
        login = f"{user}:{password_of(user)}"
        kv_login = f"{User.ALL}:{password_of(User.ALL)}"
        options = f"?ssl_ca_certs={trusted or self.certificate.file}"
        at = {role: f"localhost:{port}" for role, port in self.ports.items()}
        return {
            "PDTASKS_BROKER_URL": f"amqps://{login}@{at['broker']}/pdtasks{options}",
            "PDTASKS_BUS_URL": f"valkeys://{login}@{at['bus']}/0{options}",
            "PDTASKS_KV_URLS": f"valkeys://{kv_login}@{at['kv']}/0{options}",
        }


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServers]:
    folder = tmp_path_factory.mktemp("own")
    certificate = make_certificate(folder)
    ports = {"broker": free_ports(1)[0]}
    conf = folder / "rabbitmq" / "conf.d"
    conf.mkdir(parents=True)
    (conf / "tls.conf").write_text(_TLS_CONF.format(port=ports["broker"], certificate=certificate))
    with ExitStack() as started:
        bus = started.enter_context(ValkeyServer(folder / "bus", "bus"))
        kv = started.enter_context(ValkeyServer(folder / "kv", "kv"))
        node = started.enter_context(RabbitNode(folder / "rabbitmq"))
        _set_up_as_in_the_manual(node, bus, kv)
        bus_at = ("127.0.0.1", int(urlsplit(bus.operator_url).port or 0))
        kv_at = Path(urlsplit(kv.operator_url).path)
        ports["bus"] = started.enter_context(TlsFront(certificate, bus_at)).port
        ports["kv"] = started.enter_context(TlsFront(certificate, kv_at)).port
        yield OwnServers(node, bus, certificate, ports)


def _set_up_as_in_the_manual(node: RabbitNode, bus: ValkeyServer, kv: ValkeyServer) -> None:
    """Servers that know nobody but the operator, then what the manual says."""
    with httpx.Client(base_url=node.operator_api_url, timeout=20) as management:
        for place in ("vhosts/pdtasks", *(f"users/{user}" for user in BROKER_RIGHTS)):
            management.delete(place).raise_for_status()
    for line in commands("rabbitmqctl "):
        _, command, *arguments = split(line)
        password = f"{password_of(User(arguments[0]))}\n" if command == "add_user" else ""
        node.control(command, *arguments, stdin=password)
    with valkey.Valkey.from_url(bus.operator_url) as operator:
        operator.acl_deluser(*User)
        for line in commands("ACL SETUSER "):
            user = User(line.split()[2])
            _set_user(operator, line, password_of(user))
    with valkey.Valkey.from_url(kv.operator_url) as operator:
        line = f"ACL SETUSER {User.ALL} reset on #<sha256> {KV_RIGHTS}"
        _set_user(operator, line, password_of(User.ALL))


def _set_user(operator: valkey.Valkey, line: str, password: str) -> None:
    digest = hashlib.sha256(password.encode()).hexdigest()
    assert operator.execute_command(*line.replace("<sha256>", digest).split())


@pytest.fixture
def workers(servers: OwnServers, start_worker: StartWorker) -> list[StubWorker]:
    """One of each stage, on the servers."""
    env = {k.removeprefix("PDTASKS_").lower(): v for k, v in servers.env(User.WORKER).items()}
    started = [start_worker(role, wait=False, **env) for role in ("prefill", "decode")]
    with valkey.Valkey.from_url(servers.bus.operator_url) as bus:

        def ready() -> bool:
            assert not [w.log for w in started if w.has_ended()]
            pids = {w.pid for w in read_workers(bus) if w.state == "ready"}
            return pids == {w.pid for w in started}

        wait_until(ready, 30)
        bus.acl_log_reset()
    return started


_CLIENT = """
from pdtasks.pipeline import submit
print(submit([1, 2, 3], max_tokens=4, temperature=0).get(timeout=30)["token_ids"])
"""


def run_python(code: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PDTASKS_HOME": "/nowhere", **env},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_whole_request_crosses_tls_on_all_links_with_a_user_for_each_role(
    servers: OwnServers, workers: list[StubWorker], nursery: Nursery, tmp_path: Path
) -> None:
    assert json.loads(run_python(_CLIENT, servers.env(User.CLIENT))) == [100, 101, 102, 103]
    said = tmp_path / "api.log"
    env = servers.env(User.API) | {"PDTASKS_HOME": "/nowhere"}
    assert nursery.run([], env, said, program="tests.integration.apis_links") == 0, said.read_text()
    assert json.loads(said.read_text().splitlines()[-1]) == [100, 101, 102, 103]

    # Nobody has tried what he may not, and nothing went past TLS.
    with valkey.Valkey.from_url(servers.bus.operator_url) as bus:
        assert bus.acl_log() == []
    assert "refused" not in servers.node.process.log.read_text(errors="replace")
    listed = servers.node.control("list_connections", "--silent", "user", "ssl").splitlines()
    assert {tuple(line.split()) for line in listed} == {("pdtasks-worker", "true")}


def test_the_manuals_users_are_those_of_an_embedded_node(servers: OwnServers) -> None:
    listed = servers.node.control("list_permissions", "-p", "pdtasks", "--silent")

    # (the broker shows what is said to it: nothing was lost in a shell's quotes)
    found = {line.split("\t")[0]: tuple(line.split("\t")[1:]) for line in listed.splitlines()}
    assert found == {str(u): rights.permissions() for u, rights in BROKER_RIGHTS.items()}
    for user in BROKER_RIGHTS:
        with kombu.Connection(**amqp_arguments(servers.env(user)["PDTASKS_BROKER_URL"])) as it:
            it.connect()


# -- who is not trusted ----------------------------------------------------------------------------


@pytest.fixture
def wrong_ca(servers: OwnServers, tmp_path: Path) -> Callable[[User], dict[str, str]]:
    """An environment whose CA has not signed the servers' certificate."""
    stranger = make_certificate(tmp_path, "stranger")
    return lambda user: servers.env(user, stranger.file)


def test_a_worker_refuses_servers_that_it_does_not_trust_in_one_sentence(
    wrong_ca: Callable[[User], dict[str, str]], nursery: Nursery, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    env = wrong_ca(User.WORKER) | {"PDTASKS_HOME": str(tmp_path), "PDTASKS_DEVICE": "cpu"}

    code = nursery.run(["-Q", "prefill", "-P", "threads"], env | {"STUB_NAME": "none"}, log)

    said = log.read_text()
    assert code == 2
    assert "pdtasks: PDTASKS_BROKER_URL: the certificate of localhost:" in said
    assert "?ssl_ca_certs=/path/ca.pem" in said
    assert "password-of" not in said


def test_so_do_the_api_and_up(
    wrong_ca: Callable[[User], dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env = wrong_ca(User.API)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    load_settings.cache_clear()
    done = CliRunner().invoke(main, ["api"])

    assert done.exit_code == 1
    assert "PDTASKS_BROKER_URL: the certificate of localhost:" in done.output + str(done.stderr)

    monkeypatch.setattr("pdtasks.cluster.services._CONFIGURED_S", 0.1)
    with pytest.raises(StartFailed, match="not trusted here"):
        StackServices(Console(), lambda: None).check_configured(make_settings(home=tmp_path))


def test_a_connection_that_does_not_trust_the_server_is_not_made(
    wrong_ca: Callable[[User], dict[str, str]],
) -> None:
    env = wrong_ca(User.ALL)
    with (
        valkey.Valkey.from_url(valkey_url(env["PDTASKS_BUS_URL"])) as bus,
        pytest.raises(valkey.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        bus.ping()
    with (
        kombu.Connection(**amqp_arguments(env["PDTASKS_BROKER_URL"])) as broker,
        pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        broker.connect()
