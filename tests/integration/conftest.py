"""Real RabbitMQ and Valkey servers of our own, started once; workers with a stub engine."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import kombu
import psutil
import pytest
import valkey

from pdtasks import collecting
from pdtasks.bench.chaos.nursery import Nursery as BenchNursery
from pdtasks.bus.presence import read_workers
from pdtasks.cluster.rabbitmq import RabbitNode
from pdtasks.cluster.rights import User
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.kv.store import BlockStore
from pdtasks.naming import DEAD_QUEUE, KEPT_QUEUE, STAGES, queue_of, stages_of
from pdtasks.settings import load_settings
from tests.browser import Tab, chromium
from tests.integration.steering import Steering, steering_url
from tests.integration.store_calls import MakeStore
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
DELIVERY_LIMIT = 1
#: One beside the default model, where a test starts workers or an API for it.
FURTHER_MODEL = "further"
#: The same folder once more; that it is another model shows in how long a prompt may be, and how a
#: chat is rendered.
FURTHER_MODELS = json.dumps(
    {FURTHER_MODEL: {"max_model_len": 100, "api_args": "--chat-template {{messages[0].content}}"}}
)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """As in tests/unit: vLLM's import warns of things that are no business of ours."""
    if "vllm" in module_path.read_text():
        with warnings.catch_warnings(), collecting.rarely():
            warnings.simplefilter("ignore")
            importlib.import_module("api.client")


@dataclass(frozen=True)
class Services:
    """The servers, and how a process of ours reaches them."""

    rabbit: RabbitNode
    bus_server: ValkeyServer
    kv_server: ValkeyServer
    env: dict[str, str]  #: of this process, which asks and commands
    worker_env: dict[str, str]  #: of workers

    @property
    def bus(self) -> valkey.Valkey:
        return valkey.Valkey.from_url(self.bus_server.operator_url)

    @property
    def kv(self) -> valkey.Valkey:
        return valkey.Valkey.from_url(self.kv_server.operator_url)


@pytest.fixture(scope="package")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    home = tmp_path_factory.mktemp("services")
    with (
        RabbitNode(home / "rabbitmq") as rabbit,
        ValkeyServer(home / "bus", "bus") as bus,
        ValkeyServer(home / "kv", "kv") as kv,
    ):
        env = {
            "PDTASKS_HOME": str(home),
            "PDTASKS_BROKER_URL": rabbit.url,
            "PDTASKS_BROKER_API_URL": rabbit.api_url,
            "PDTASKS_BUS_URL": bus.url,
            "PDTASKS_KV_URLS": kv.url,
            "PDTASKS_DEVICE": "cpu",
            "PDTASKS_DELIVERY_LIMIT": str(DELIVERY_LIMIT),
            "PDTASKS_WORKER_TTL_S": "3",
            # Else all that is asked here would be short enough to be answered by one worker.
            "PDTASKS_SHORT_PROMPT_TOKENS": "0",
        }
        worker = {
            "PDTASKS_BROKER_URL": rabbit.url_for(User.WORKER),
            "PDTASKS_BROKER_API_URL": "",
            "PDTASKS_BUS_URL": bus.url_for(User.WORKER),
        }
        yield Services(rabbit, bus, kv, env, env | worker)


@pytest.fixture(scope="package")
def our_app(services: Services) -> Iterator[Any]:
    """`pdtasks.app.app` of this process, connected to the services."""
    from pdtasks import pipeline
    from pdtasks.app import app

    with pytest.MonkeyPatch.context() as patch:
        for name, value in services.env.items():
            patch.setenv(name, value)
        # For this process alone, not for stacks that it starts.
        patch.setenv("PDTASKS_MODELS", FURTHER_MODELS)
        load_settings.cache_clear()
        load_settings()
        patch.delenv("PDTASKS_MODELS")
        sys.modules.pop("configs.celeryconfig", None)
        app.config_from_object("configs.celeryconfig", force=True)
        # Whoever asked for a result before has made the app a backend of the old settings.
        patch.setattr(app, "_backend_cache", None)
        patch.setattr(app, "_local", threading.local())
        yield app
        # A process that asks keeps these for its life; here several lives follow each other.
        pipeline._shared.close()
        app.backend.result_consumer.stop()
        app.backend.client.connection_pool.disconnect()
        app.close()
    load_settings.cache_clear()


@pytest.fixture
def publisher(our_app: Any) -> Iterator[Any]:
    """A `Publisher` of this process."""
    from pdtasks.pipeline import Publisher

    made = Publisher()
    yield made
    made.close()


@pytest.fixture
def aborter(our_app: Any) -> Iterator[Any]:
    """An `Aborter` of this process."""
    from pdtasks.broker.aborting import Aborter

    made = Aborter()
    yield made
    made.close()


@pytest.fixture
def abort(our_app: Any) -> Callable[[str], None]:
    """Aborts a request and waits until every worker has heard of it."""

    def tell(request_id: str) -> None:
        replies = our_app.control.broadcast(
            "pdtasks_abort", arguments={"request_ids": [request_id]}, reply=True, timeout=1.0
        )
        assert replies
        assert all("ok" in answer for reply in replies for answer in reply.values())

    return tell


@pytest.fixture
def channel(services: Services) -> Iterator[Any]:
    """A channel to RabbitMQ beside the product's."""
    with kombu.Connection(services.rabbit.operator_url) as connection:
        yield connection.default_channel


# -- block stores ------------------------------------------------------------------------------


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    """Makes block stores; closes what it made."""
    made: list[BlockStore] = []

    def make(*urls: str, ttl_s: int = 60, timeout_s: float = 10.0) -> BlockStore:
        made.append(BlockStore(urls, ttl_s=ttl_s, timeout_s=timeout_s))
        return made[-1]

    yield make
    for store in made:
        store.close()


class StoreServer(ValkeyServer):
    """One for a block store.  Of the product's own only the bus listens on TCP, and no user of it
    has rights on blocks: there the store is the operator."""

    @property
    def url(self) -> str:
        return super().url if self.kind == "kv" else self.operator_url


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server that a test may stop, over TCP."""
    with StoreServer(tmp_path / "own", "bus") as server:
        yield server


@pytest.fixture(scope="package")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """One for all tests, over TCP."""
    with StoreServer(tmp_path_factory.mktemp("store"), "bus") as server:
        yield server


@pytest.fixture(params=["unix socket", "tcp"])
def server(
    request: pytest.FixtureRequest, services: Services, tcp_server: ValkeyServer
) -> ValkeyServer:
    """The store takes either."""
    server = services.kv_server if request.param == "unix socket" else tcp_server
    with valkey.Valkey.from_url(server.operator_url) as client:
        client.flushall()
    return server


# -- workers -----------------------------------------------------------------------------------


@dataclass
class StubWorker:
    """A running worker with a stub engine."""

    name: str
    role: str
    pid: int
    log_file: Path
    steering: Steering
    nursery: Nursery = field(repr=False)
    status: int | None = None

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        if self.status is None:
            self.status = self.nursery.wait(self.pid)
        return self.status

    def has_ended(self) -> bool:
        if self.status is not None:
            return True
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] == "Z"


class Nursery:
    """Forks workers with the stub engine of tests, and programs of tests that need vLLM."""

    def __init__(self, forks: BenchNursery) -> None:
        self._forks = forks

    def start(
        self,
        argv: list[str],
        env: dict[str, str],
        log: Path,
        program: str = "tests.integration.stub_worker",
    ) -> int:
        """Start a worker with nothing but `env` of the product's variables; returns its pid.

        Args:
            program: another module that is run.
        """
        base = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}
        base["PYTHONPATH"] = str(ROOT)
        order = {
            "argv": [sys.executable, "-m", program, *argv],
            "env": base | env,
            "log": str(log),
            "cwd": str(ROOT),
            "stub": "tests.integration.stub_engine",
        }
        return int(self._forks.ask(order)["pid"])

    def wait(self, pid: int) -> int:
        """The exit status of a worker, once it has ended."""
        return int(self._forks.ask({"wait": pid})["status"])

    def run(self, argv: list[str], env: dict[str, str], log: Path, **program: str) -> int:
        """Run one that ends by itself; returns its exit status."""
        pid = self.start(argv, env, log, **program)
        killer = threading.Timer(30, os.kill, (pid, signal.SIGKILL))
        killer.start()
        try:
            return self.wait(pid)
        finally:
            killer.cancel()


@pytest.fixture(scope="package")
def bench_nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchNursery]:
    """Where all stub workers and API processes fork off, those of `pdtasks bench` too."""
    with BenchNursery(tmp_path_factory.mktemp("nursery") / "log") as nursery:
        yield nursery


@pytest.fixture(scope="package")
def nursery(bench_nursery: BenchNursery) -> Nursery:
    """The same, for workers with the stub engine of tests."""
    return Nursery(bench_nursery)


@contextmanager
def cut_connections(services: Services, worker: StubWorker) -> Iterator[None]:
    """RabbitMQ closes what the worker has open; on leaving, all of it is closed."""
    rabbit = urlsplit(services.rabbit.url).port

    def ports() -> set[int]:
        return {
            c.laddr.port
            for c in psutil.Process(worker.pid).net_connections("tcp")
            if c.status == psutil.CONN_ESTABLISHED and c.raddr.port == rabbit
        }

    with httpx.Client(base_url=services.rabbit.operator_api_url, timeout=10) as api:

        def ours() -> list[str]:
            # RabbitMQ's list is some seconds old, and the worker may just be connecting again:
            # wait until all that it has open now are listed.
            listed = {c["peer_port"]: c["name"] for c in api.get("connections").json()}
            wanted = ports()
            return [listed[port] for port in wanted] if wanted <= set(listed) else []

        names = wait_until(ours)
        for name in names:
            api.delete(f"connections/{name}", headers={"X-Reason": "test"}).raise_for_status()
        yield


StartWorker = Callable[..., StubWorker]


@pytest.fixture
def start_worker(
    nursery: Nursery, services: Services, our_app: Any, tmp_path: Path
) -> Iterator[StartWorker]:
    """Starts workers on empty queues, an empty bus and an empty kv server; ends what it started."""
    _delete_queues(services)
    services.bus.flushall()
    services.kv.flushall()
    started: list[StubWorker] = []

    def start(
        role: str,
        number: int = 1,
        *,
        held: bool = False,
        wait: bool = True,
        concurrency: int = 8,
        model: str = "",
        **env: str,
    ) -> StubWorker:
        name = queue_of(f"{role}{number}", model)
        steering_at = steering_url(services.bus_server.operator_url)
        steering = Steering(name, valkey.Valkey.from_url(steering_at))
        if held:
            steering.hold()
        log = tmp_path / f"{name}.{len(started)}.log"
        settings = {
            key.upper() if key.startswith(("stub_", "otel_")) else f"PDTASKS_{key.upper()}": value
            for key, value in env.items()
        }
        if model:
            settings["PDTASKS_MODELS"] = FURTHER_MODELS
        argv = [
            *(
                "-Q",
                ",".join(queue_of(stage, model) for stage in stages_of(role)),
                "-P",
                "threads",
                "-c",
                str(concurrency),
            ),
            *("-n", f"{name}@test", "-E", "--without-mingle", "--without-gossip", "-l", "INFO"),
        ]
        stub = {"STUB_NAME": name, "STUB_STEERING": steering_at}
        pid = nursery.start(argv, services.worker_env | stub | settings, log)
        worker = StubWorker(name, role, pid, log, steering, nursery)
        started.append(worker)
        if wait:
            wait_until(lambda: is_ready(worker) or worker.has_ended(), what=f"{name} is ready")
            assert not worker.has_ended(), worker.log
        return worker

    def is_ready(worker: StubWorker) -> bool:
        return any(w.pid == worker.pid and w.state == "ready" for w in read_workers(services.bus))

    yield start
    for worker in started:
        if not worker.has_ended():
            worker.signal(signal.SIGKILL)
        worker.wait()
    _delete_queues(services)


def _delete_queues(services: Services) -> None:
    with kombu.Connection(services.rabbit.operator_url) as connection:
        of_further_model = (queue_of(stage, FURTHER_MODEL) for stage in STAGES)
        for queue in (*STAGES, *of_further_model, DEAD_QUEUE, KEPT_QUEUE):
            try:
                connection.default_channel.queue_delete(queue)
            except connection.channel_errors:
                connection.default_channel.close()


@pytest.fixture
def make_asker(services: Services, start_worker: StartWorker) -> Iterator[Callable[[], Any]]:
    """Makes askers; the queues are empty then."""
    from tests.integration.asker import Asker

    made: list[Asker] = []

    def make() -> Asker:
        made.append(Asker(services.bus))
        return made[-1]

    yield make
    for asker in made:
        asker.close()


@pytest.fixture
def asker(make_asker: Callable[[], Any]) -> Any:
    return make_asker()


@pytest.fixture
def half_answered(
    start_worker: StartWorker, asker: Any
) -> Callable[..., tuple[StubWorker, list[int]]]:
    """A decode worker that has made two tokens of "r" and stands; the three that there are."""

    def begin(**request: Any) -> tuple[StubWorker, list[int]]:
        start_worker("prefill")
        worker = start_worker("decode", held=True)
        asker.ask("r", **request)
        wait_until(worker.steering.added)
        worker.steering.step(2)
        wait_until(lambda: len(asker.tokens()) == 3)
        return worker, asker.tokens()

    return begin


HalfAnswered = Callable[..., tuple[StubWorker, list[int]]]


@pytest.fixture(scope="module")
def open_tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Tab]]:
    with chromium(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def tab(open_tab: Callable[[], Tab]) -> Iterator[Tab]:
    made = open_tab()
    made.look(1280, 900)
    yield made
    made.close()
