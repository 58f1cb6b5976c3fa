"""A stack in simulation: API processes, broker, buses, kv servers, and engines in their steps.

A request goes as in ARCHITECTURE.md, "The life of a request".  Engines are `batching`, timed as the
stub's; everything else is a `Station` that takes its costs' time for a request, a message, a token.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import simpy

from pdtasks.bench.scale.batching import Batch, Request
from pdtasks.bench.scale.costs import Costs
from pdtasks.bench.scale.gpu import KV_BYTES_OF_TOKEN, Gpu
from pdtasks.bench.scale.stations import Station, later
from pdtasks.bench.serving.client import Sample
from pdtasks.settings import SHORT_PROMPT_TOKENS

#: Tokens up to which decode engines compute prompts themselves.
SHORT_PROMPT: Final = SHORT_PROMPT_TOKENS["cuda"]
#: As `api.line`: steps of a prefill engine that are full, and prompts that it has at least.
_STEPS: Final = 2
_LEAST_PROMPTS: Final = 2
#: As there: short prompts that a decode engine computes at once, in longest ones.
_SHORT_PROMPTS: Final = 2
#: As there: part of the decode workers' places whose requests are on their way; at least so many.
_ON_THEIR_WAY: Final = 0.25
_LEAST_ON_THEIR_WAY: Final = 8


@dataclass(frozen=True)
class Layout:
    """How many of each."""

    prefill: int = 0
    decode: int = 0
    both: int = 0  #: engines that compute prompts where they answer them
    apis: int = 1
    buses: int = 1
    kv_servers: int = 0  #: 0: all engines are on one host and hand over through rings

    @property
    def gpus(self) -> int:
        """All engines."""
        return self.prefill + self.decode + self.both


@dataclass(frozen=True)
class Ask:
    """A request that comes. Tokens; seconds since the beginning."""

    at: float
    prompt: int
    answer: int


@dataclass
class _Visit:
    """A request on its way."""

    key: str
    ask: Ask
    api: int
    at: list[float] = field(default_factory=list)  #: when the client has read each token
    is_on_its_way: bool = False  #: to a decode worker


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation."""

    samples: Sequence[Sample]
    seconds: float  #: from the first request to the last token
    #: Part of the time in which each was busy while requests came, mean of those of its kind.  (A
    #: decode engine is busy whenever it has any answer to write: how full it is its steps say.)
    utilisation: dict[str, float]


class _Engine:
    """One engine: step after step, as long as anybody is in its batch.

    Its worker, one Python process, takes the jobs one after the other.
    """

    def __init__(
        self,
        env: simpy.Environment,
        gpu: Gpu,
        job_s: float,
        on_step: Callable[[list[Request]], None],
    ) -> None:
        self.busy_s = 0.0
        self._job_s = job_s
        self._worker = Station(env, "worker")
        self._batch = Batch(gpu)
        self._env = env
        self._on_step = on_step
        self._work = env.event()
        env.process(self._run())

    def take(self, request: Request) -> None:
        self._worker.then(self._job_s, partial(self._add, request))

    def _add(self, request: Request) -> None:
        self._batch.add(request)
        if not self._work.triggered:
            self._work.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            step = self._batch.begin_step()
            if step is None:
                self._work = self._env.event()
                yield self._work
                continue
            yield self._env.timeout(step.seconds)
            self.busy_s += step.seconds
            self._on_step(self._batch.end_step(step))


class System:
    """One stack."""

    def __init__(
        self, layout: Layout, gpu: Gpu, costs: Costs, *, short_prompt: int = SHORT_PROMPT
    ) -> None:
        """`short_prompt`: tokens up to which decode engines compute prompts themselves."""
        self._layout, self._gpu, self._costs = layout, gpu, costs
        self._short_prompt = short_prompt
        self._env = simpy.Environment()
        self._apis = [Station(self._env, "api") for _ in range(layout.apis)]
        self._buses = [Station(self._env, "bus") for _ in range(layout.buses)]
        self._broker = Station(self._env, "broker", costs.broker_cores)
        self._kv = [Station(self._env, "kv")] * bool(layout.kv_servers)
        self._prefill = [self._engine(self._prefilled) for _ in range(layout.prefill)]
        self._decode = [self._engine(self._told) for _ in range(layout.decode + layout.both)]
        self._turns = {"prefill": 0, "decode": 0}
        self._visits: dict[str, _Visit] = {}
        self._line: deque[_Visit] = deque()
        self._at_decode: dict[str, int] = {}  # prompt tokens that decode engines have to compute
        self._computing: dict[str, int] = {}  # prompt tokens that prefill engines have to compute
        self._num_on_their_way = 0

    def run(self, asks: Sequence[Ask], *, limit_s: float = 600.0) -> Outcome:
        """Ask all of it; ends with the last token, or `limit_s` after the last request."""
        apis = _in_shuffled_turns(self._layout.apis)
        visits = [_Visit(str(number), ask, next(apis)) for number, ask in enumerate(asks)]
        self._visits = {visit.key: visit for visit in visits}
        for visit in visits:
            later(self._env, visit.ask.at, partial(self._come, visit))
        came_s = max(ask.at for ask in asks)
        self._env.run(until=came_s or 1e-9)
        utilisation = self._utilisation(came_s) if came_s else {}
        self._env.run(until=came_s + limit_s)
        samples = [
            Sample(v.ask.at, tuple(v.at), None if len(v.at) == v.ask.answer else "no whole answer")
            for v in visits
        ]
        end = max((v.at[-1] for v in visits if v.at), default=came_s)
        return Outcome(samples, end - min(ask.at for ask in asks), utilisation)

    # -- the way of a request ------------------------------------------------------------------

    def _come(self, visit: _Visit) -> None:
        costs = self._costs
        service_s = costs.api_request_s + visit.ask.prompt * costs.api_prompt_token_s
        self._apis[visit.api].then(service_s, partial(self._stand_in_line, visit))
        self._bus_of(visit.api).visit(costs.bus_request_s)

    def _stand_in_line(self, visit: _Visit) -> None:
        if self._layout.both or self._is_for_decode(visit.ask.prompt):
            self._at_decode[visit.key] = visit.ask.prompt
            to_engine = partial(self._compute_where_answered, visit)
            self._broker.then(self._costs.broker_request_s / 2, to_engine, self._costs.publish_s)
            return
        self._line.append(visit)
        self._publish()

    def _is_for_decode(self, prompt: int) -> bool:
        """Is it short, and do decode engines have few enough of those?"""
        most = _SHORT_PROMPTS * self._short_prompt * self._layout.decode
        return prompt <= self._short_prompt and sum(self._at_decode.values()) + prompt <= most

    def _publish(self) -> None:
        while self._line and self._has_room(self._line[0]):
            visit = self._line.popleft()
            self._computing[visit.key] = visit.ask.prompt
            self._num_on_their_way += 1
            visit.is_on_its_way = True
            self._broker.then(
                self._costs.broker_request_s / 2,
                partial(self._compute, visit),
                self._costs.publish_s,
            )

    def _has_room(self, visit: _Visit) -> bool:
        slots = self._layout.decode * self._gpu.max_num_seqs
        if self._num_on_their_way >= max(_LEAST_ON_THEIR_WAY, int(_ON_THEIR_WAY * slots)):
            return False
        if len(self._computing) < _LEAST_PROMPTS * self._layout.prefill:
            return True
        tokens = sum(self._computing.values()) + visit.ask.prompt
        return tokens <= _STEPS * self._gpu.step_tokens * self._layout.prefill

    def _compute(self, visit: _Visit) -> None:
        engine = self._next("prefill", self._prefill)
        engine.take(Request(visit.key, visit.ask.prompt, 0, 1, saves=True))

    def _compute_where_answered(self, visit: _Visit) -> None:
        engine = self._next("decode", self._decode)
        engine.take(Request(visit.key, visit.ask.prompt, 0, visit.ask.answer))

    def _prefilled(self, made: list[Request]) -> None:
        self._told(made)
        for request in made:
            visit = self._visits[request.key]
            del self._computing[visit.key]
            if visit.ask.answer > 1:
                delay = self._costs.handover_s + self._through_kv_s(visit.ask.prompt)
                self._broker.then(
                    self._costs.broker_request_s / 2, partial(self._hand_over, visit), delay
                )
        self._publish()

    def _through_kv_s(self, prompt: int) -> float:
        """Until the KV has gone to another host, by way of the kv servers."""
        if not self._kv:
            return 0.0
        costs, servers = self._costs, self._layout.kv_servers
        size = prompt * KV_BYTES_OF_TOKEN
        # A prompt's blocks are spread over all servers; by itself it gets no more than one gives.
        put, get = size / costs.kv_put_bytes_per_s, size / costs.kv_get_bytes_per_s
        queued = self._kv[0].visit((put + get) / servers) - self._env.now
        return max(queued, (1 - costs.kv_hidden) * put + get)

    def _hand_over(self, visit: _Visit) -> None:
        prompt, answer = visit.ask.prompt, visit.ask.answer
        engine = self._next("decode", self._decode)
        engine.take(Request(visit.key, 0, prompt + 1, answer - 1, to_load=prompt))

    def _told(self, made: list[Request]) -> None:
        """One message for each API process that has a request in the step."""
        by_api: dict[int, list[_Visit]] = {}
        for request in made:
            self._at_decode.pop(request.key, None)
            visit = self._visits[request.key]
            by_api.setdefault(visit.api, []).append(visit)
        for api, visits in by_api.items():
            relay = partial(self._relay, api, visits)
            self._bus_of(api).then(self._costs.bus_message_s, relay)

    def _relay(self, api: int, visits: list[_Visit]) -> None:
        service_s = self._costs.api_message_s + len(visits) * self._costs.api_token_s
        self._apis[api].then(service_s, partial(self._read, visits))

    def _read(self, visits: list[_Visit]) -> None:
        for visit in visits:
            visit.at.append(self._env.now)
            if visit.is_on_its_way and len(visit.at) >= min(2, visit.ask.answer):
                visit.is_on_its_way = False
                self._num_on_their_way -= 1
                self._publish()

    def _bus_of(self, api: int) -> Station:
        """Replies of an API process go over one bus, always the same."""
        return self._buses[api % self._layout.buses]

    # -- parts ---------------------------------------------------------------------------------

    def _engine(self, on_step: Callable[[list[Request]], None]) -> _Engine:
        return _Engine(self._env, self._gpu, self._costs.worker_request_s / 2, on_step)

    def _next(self, stage: str, engines: Sequence[_Engine]) -> _Engine:
        """RabbitMQ gives its consumers messages in turn."""
        self._turns[stage] += 1
        return engines[self._turns[stage] % len(engines)]

    def _utilisation(self, seconds: float) -> dict[str, float]:
        stations = [*self._apis, *self._buses, self._broker, *self._kv]
        found: dict[str, list[float]] = {}
        for station in stations:
            found.setdefault(station.name, []).append(station.utilisation(seconds))
        for name, engines in (("prefill", self._prefill), ("decode", self._decode)):
            if engines:
                found[name] = [engine.busy_s / seconds for engine in engines]
        return {name: round(sum(own) / len(own), 4) for name, own in found.items()}


def _in_shuffled_turns(number: int) -> Iterator[int]:
    """API processes as a load balancer chooses them: as often each, but not as RabbitMQ's turns.

    Plain turns on both would tie each API process to some of the engines.
    """
    rng = random.Random(0)  # noqa: S311 - not a secret
    every = list(range(number))
    while True:
        rng.shuffle(every)
        yield from every


def poisson(rate: float, number: int, prompt: int, answer: int, rng: random.Random) -> list[Ask]:
    """Requests at random times, `rate` a second; 0: all at once. As `serving.client.ask_all`."""
    at, asks = 0.0, []
    for _ in range(number):
        asks.append(Ask(at, prompt, answer))
        if rate:
            at += rng.expovariate(rate)
    return asks
