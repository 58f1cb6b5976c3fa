"""What does it cost to be looked at? One stack, in turns with all observability on and off.

On: Flower runs, workers tell it of each task, and all metrics are scraped every 5 s.  Off: Flower
is frozen, no events of tasks are sent, and nobody scrapes.  Presence, counting and ports of metrics
are parts of the product and there in both.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import click
import valkey
from celery import Celery

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.load import Order
from pdtasks.bench.control.stack import ControlStack, Services, private_services
from pdtasks.bench.stream.client import Crowd
from pdtasks.bench.stream.stack import MODEL, our_side
from pdtasks.bus.presence import read_workers
from pdtasks.cluster import children
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import free_ports, http_status, wait_until
from pdtasks.cluster.process import StartFailed
from pdtasks.cluster.rights import User
from pdtasks.errors import PdtasksError

#: As a Prometheus of `deploy/compose` has it.
_SCRAPE_S: Final = 5.0
_START_S: Final = 60.0
_ANSWER_S: Final = 10.0
#: Of each stream before its first turn.
_WARM_TOKENS: Final = 10
#: The kernel counts CPU in these: a short turn may seem to have used none.
_TICK_S: Final = 0.01
#: By its name in the JSON: what it is, for people.
FIGURES: Final[Mapping[str, str]] = {
    "requests_per_s": "requests/s (bench control)",
    "cpu_ms_per_request": "CPU of client and workers, ms a request",
    "tokens_per_s": "tokens/s (bench stream)",
    "cpu_us_per_token": "CPU of API, workers, services, us a token",
}

#: Figures, with and without.
Round = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    rounds: int = 6
    seconds: float = 6.0  #: of requests in a round, with and without
    in_flight: int = 64
    streams: int = 128
    tokens: int = 400  #: of each stream in a round, with and without


class Onlooker:
    """Flower and a scraper of one stack, which look or do not. A context; looks at first."""

    def __init__(self, home: Path, services: Services, apis: Sequence[str] = ()) -> None:
        """`apis`: URLs of API processes; workers are found on the bus."""
        self._services = services
        self._apis = [urlsplit(url).netloc for url in apis]
        settings = children.stack_settings(
            home=home,
            broker_url=services.broker.url_for(User.FLOWER),
            broker_api_url=services.broker.api_url_for(User.FLOWER),
            bus_url="",
            bus_urls=(),
            kv_urls=(),
            flower_port=free_ports(1)[0],
        )
        self._url = children.flower_url(settings)
        self._flower = children.flower(settings, "of a bench")
        # Not ours, whose settings are those of this process.
        self._celery = Celery(broker=services.broker.operator_url, set_as_current=False)
        self._celery.conf.accept_content = ["msgpack", "json"]
        self._looks = threading.Event()
        self._ended = threading.Event()
        self._scraper = threading.Thread(target=self._scrape, daemon=True)
        self.num_scrapes = 0

    def __enter__(self) -> Self:
        self._flower.start()
        if not wait_until(lambda: http_status(f"{self._url}/healthcheck") == 200, _START_S):
            self._flower.kill()
            raise self._flower.failure(f"was not ready within {_START_S:.0f} s")
        self._scraper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._looks.set()
        self._flower.signal(signal.SIGCONT)
        self._flower.stop(5.0)
        self._scraper.join(_ANSWER_S)
        self._celery.close()

    def look(self, does: bool) -> None:
        """Begin, or leave off. Raises StartFailed when a worker does not hear of it."""
        self._flower.signal(signal.SIGCONT if does else signal.SIGSTOP)
        command = "enable_events" if does else "disable_events"
        heard = self._celery.control.broadcast(command, reply=True, limit=2, timeout=_ANSWER_S)
        if len(heard) < 2:
            raise StartFailed(f"not all workers have heard of {command}")
        if not self._scraper.is_alive():
            raise StartFailed("metrics are not scraped any more: a port does not answer")
        if does:
            self._looks.set()
        else:
            self._looks.clear()

    def _scrape(self) -> None:
        with valkey.Valkey.from_url(self._services.bus.url) as bus:
            while self._looks.wait() and not self._ended.is_set():
                of_workers = [worker.metrics for worker in read_workers(bus) if worker.metrics]
                for address in (*of_workers, *self._apis):
                    url = f"http://{address}/metrics"
                    with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
                        answer.read()
                    self.num_scrapes += 1
                self._ended.wait(_SCRAPE_S)


def run_observed(
    plan: Plan,
    home: Path,
    services: Services,
    progress: Callable[[str], None],
    nursery: Nursery,
) -> list[Round]:
    """Run `plan` under `home`. Raises StartFailed when a part does not start, or fails."""
    requests = _requests(plan, home / "control", services, progress, nursery)
    tokens = _tokens(plan, home / "stream", services, progress, nursery)
    return [
        {side: {**of_requests[side], **of_tokens[side]} for side in ("on", "off")}
        for of_requests, of_tokens in zip(requests, tokens, strict=True)
    ]


def _turns(number: int) -> tuple[str, str]:
    """Who comes first finds another machine than who comes second."""
    return ("on", "off") if number % 2 else ("off", "on")


def _used(cpu_s: float) -> float:
    return max(cpu_s, _TICK_S)


def _requests(
    plan: Plan,
    home: Path,
    services: Services,
    progress: Callable[[str], None],
    nursery: Nursery,
) -> list[dict[str, dict[str, float]]]:
    with ControlStack(
        home, services, threads=plan.in_flight, prompt_tokens=1000, nursery=nursery, stock=False
    ) as stack:
        (side,) = stack.sides
        order = Order(plan.in_flight, plan.seconds)
        rounds: list[dict[str, dict[str, float]]] = [{} for _ in range(plan.rounds)]
        with Onlooker(home, services) as onlooker:
            side.client.do(order)  # code is run for the first time
            for number in range(plan.rounds):
                for name in _turns(number):
                    onlooker.look(name == "on")
                    before = side.cpu_s()
                    done = side.client.do(order)
                    used = _used(side.cpu_s() - before)
                    rounds[number][name] = {
                        "requests_per_s": done.per_s(order),
                        "cpu_ms_per_request": 1e3 * used / len(done.took_s),
                    }
                    shown = rounds[number][name]["requests_per_s"]
                    progress(f"round {number + 1} of {plan.rounds}: {name} {shown:,.0f} requests/s")
        return rounds


def _tokens(
    plan: Plan,
    home: Path,
    services: Services,
    progress: Callable[[str], None],
    nursery: Nursery,
) -> list[dict[str, dict[str, float]]]:
    starting = our_side(
        "pdtasks", home, nursery, streams=plan.streams, stub="stub", services=services
    )
    with starting as side, ExitStack() as ends:
        ends.callback(side.begin_to_stop)
        side.wait()
        onlooker = ends.enter_context(Onlooker(home, services, [side.url]))

        async def measure() -> list[dict[str, dict[str, float]]]:
            rounds: list[dict[str, dict[str, float]]] = [{} for _ in range(plan.rounds)]
            tokens = 1 + _WARM_TOKENS + 2 * plan.tokens + 1
            for number in range(plan.rounds):
                # Others in each round: a stream has as many tokens as the model takes.
                async with Crowd(side.url, MODEL, streams=plan.streams, tokens=tokens) as crowd:
                    await crowd.relay(_WARM_TOKENS)
                    for name in _turns(number):
                        onlooker.look(name == "on")
                        before = side.cpu_s()
                        seconds = await crowd.relay(plan.tokens)
                        used = _used(side.cpu_s() - before)
                        relayed = plan.streams * plan.tokens
                        rounds[number][name] = {
                            "tokens_per_s": relayed / seconds,
                            "cpu_us_per_token": 1e6 * used / relayed,
                        }
                        shown = rounds[number][name]["tokens_per_s"]
                        progress(
                            f"round {number + 1} of {plan.rounds}: {name} {shown:,.0f} tokens/s"
                        )
            return rounds

        return asyncio.run(measure())


# -- what is shown ---------------------------------------------------------------------------------


def to_json(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians; `ratios`: on by off of each round, their median, least and most."""
    return {
        side: {name: _median(r[side][name] for r in rounds) for name in FIGURES}
        for side in ("on", "off")
    } | {
        "ratios": {
            name: {"median": _median(ratios), "least": min(ratios), "most": max(ratios)}
            for name in FIGURES
            for ratios in [[round(r["on"][name] / r["off"][name], 3) for r in rounds]]
        },
        "rounds": [
            {side: {name: round(f, 3) for name, f in of.items()} for side, of in one.items()}
            for one in rounds
        ],
    }


def format_report(figures: Mapping[str, Any]) -> str:
    """A table."""
    lines = [f"{'':<44}{'on':>12}{'off':>12}{'on/off':>9}  of the rounds"]
    for name, shown in FIGURES.items():
        ratio = figures["ratios"][name]
        lines.append(
            f"{shown:<44}{figures['on'][name]:>12,.2f}{figures['off'][name]:>12,.2f}"
            f"{ratio['median']:>9.3f}  {ratio['least']:.3f} to {ratio['most']:.3f}"
        )
    return "\n".join(lines)


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


@contextmanager
def _folder() -> Iterator[Path]:
    """One of its own, which is kept when something fails."""
    home = Path(tempfile.mkdtemp(prefix="pdtasks-observed-"))
    yield home
    shutil.rmtree(home, ignore_errors=True)


def run_command(plan: Plan, json_file: Path | None) -> None:
    """`pdtasks bench observed`: run `plan` on services of its own."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    console.line("a stub engine: it computes nothing")
    with _folder() as home:
        try:
            with Nursery(home / "nursery.log") as nursery, private_services(home) as services:
                figures = to_json(run_observed(plan, home, services, console.line, nursery))
        except PdtasksError:
            console.line(f"the logs are kept in {home}")
            raise
    click.echo(format_report(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
