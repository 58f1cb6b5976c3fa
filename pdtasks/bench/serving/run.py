"""One topology after the other, each asked the same, within a time.

What is measured is written at once: a run that is cut off leaves what it had.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from pdtasks.bench.serving import devices, exact
from pdtasks.bench.serving.client import Sample, ask_all, make_requests
from pdtasks.bench.serving.plan import Plan, Topology, Workload
from pdtasks.bench.serving.processes import MODEL, Running
from pdtasks.bench.serving.rows import Row, summarise
from pdtasks.bench.serving.vllm_client import ClientFailed, can_ask, run_vllm_client
from pdtasks.cluster.process import StartFailed
from pdtasks.errors import PdtasksError

OWN_CLIENT = "pdtasks"
VLLM_CLIENT = "vllm bench serve"

#: Seconds that a run needs beside the time in which its requests come: the last answers, a start
#: of vLLM's client.
_SLACK_S = 15.0
_VLLM_SLACK_S = 25.0


class Starts(Protocol):
    """`processes.Host.started`, as far as this module needs it."""

    def __call__(
        self, topology: Topology, *, engine: Mapping[str, Any], folder: Path, limit_s: float
    ) -> AbstractContextManager[Running]: ...


@dataclass(frozen=True)
class Run:
    """One row to be."""

    topology: str
    workload: str
    rate: float
    repeat: int
    client: str

    def __str__(self) -> str:
        at = f"at {self.rate:g}/s" if self.rate else "at once"
        return f"{self.topology}, {self.workload} {at}, run {self.repeat}, {self.client}"


@dataclass(frozen=True)
class Wanted:
    """What of a plan is run."""

    topologies: Sequence[str]
    workloads: Sequence[str]
    rates: Sequence[float] = ()  #: instead of the workloads' own
    repeats: int = 1
    clients: Sequence[str] = (OWN_CLIENT,)
    exact: bool = False  #: compare answers, too


@dataclass
class Found:
    """What came out."""

    rows: list[Row] = field(default_factory=list)
    exact: list[exact.Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  #: what was not run, or not as meant


def arrivals_of(run: Run) -> random.Random:
    """When the requests of `run` come: at the same times in all topologies.

    A hundred requests at random are few: one topology would have the luck of another's draw.
    """
    return random.Random(f"{run.workload} {run.rate:g} {run.repeat}")  # noqa: S311 - not a secret


class Runner:
    """Runs a plan on this host. For one thread."""

    def __init__(
        self,
        plan: Plan,
        start: Starts,
        *,
        tokenizer: str,
        machine: str,
        out: Path,
        limit_s: float,
        progress: Callable[[str], None],
    ) -> None:
        """Args:
        tokenizer: folder or name, for vLLM's client.
        machine: in words, for the rows.
        out: folder for figures (`rows.json`, `exact.json`, `problems.json`) and logs.
        limit_s: nothing begins that would not end within it.
        """
        self._plan = plan
        self._start = start
        self._tokenizer = tokenizer
        self._machine = machine
        self._out = out
        self._until = time.monotonic() + limit_s
        self._progress = progress
        self._found = Found()
        self._reference: tuple[str, list[exact.Answer]] | None = None

    def run(self, wanted: Wanted) -> Found:
        """Run what is `wanted`; what cannot be run is among the problems."""
        for name in wanted.topologies:
            if self._left() < _SLACK_S:
                self._problem(f"{name}: not run, no time was left")
                continue
            topology = self._plan.topologies[name]
            self._progress(f"{name}: starting")
            began = time.monotonic()
            try:
                with self._start(
                    topology,
                    engine=self._plan.engine_of(topology),
                    folder=self._out / _file_name(name),
                    limit_s=self._left(),
                ) as running:
                    self._progress(f"{name}: ready after {time.monotonic() - began:.0f} s")
                    self._ask(name, running, wanted)
            except StartFailed as exc:
                self._problem(f"{name}: {exc}")
        return self._found

    def _ask(self, name: str, running: Running, wanted: Wanted) -> None:
        for repeat in range(1, wanted.repeats + 1):
            for workload in wanted.workloads:
                for rate in wanted.rates or self._plan.workloads[workload].rates:
                    for client in wanted.clients:
                        self._measure(Run(name, workload, rate, repeat, client), running)
        # Last: its prompts are the same for every topology, and of a kind of their own.
        if wanted.exact:
            self._compare(name, running)

    def _measure(self, run: Run, running: Running) -> None:
        workload = self._plan.workloads[run.workload]
        by_vllm = run.client == VLLM_CLIENT
        if by_vllm and not can_ask(workload):
            self._problem(f"{run}: not run, that client cannot mix lengths of prompts")
            return
        slack = _VLLM_SLACK_S if by_vllm else _SLACK_S
        if self._left() < workload.expected_s(run.rate) + slack:
            self._problem(f"{run}: not run, no time was left")
            return
        ask = self._ask_with_vllm if by_vllm else self._ask_with_ours
        try:
            with devices.watched_gpus() as busy:
                samples, seconds = ask(run, workload, running)
        except TimeoutError:
            self._problem(f"{run}: not finished, no time was left")
            return
        except ClientFailed as exc:
            self._problem(f"{run}: {exc}")
            return
        figures = summarise(samples, workload.answer, seconds)
        row = Row(device=self._machine, gpu_percent=busy, **asdict(run), **figures)
        self._found.rows.append(row)
        self._write("rows.json", [r.to_json() for r in self._found.rows])
        self._progress(
            f"{run}: {row.requests - row.failed} of {row.requests} answered in {seconds:.0f} s, "
            f"goodput {row.goodput}"
        )
        if row.failed:
            self._problem(f"{run}: {row.failed} failed, one with {row.first_failure}")

    def _ask_with_ours(
        self, run: Run, workload: Workload, running: Running
    ) -> tuple[list[Sample], float]:
        # From the clock: two runs that shared prompts would measure caches.
        rng = random.Random()  # noqa: S311 - not a secret
        requests = list(make_requests(workload, run.rate, rng))

        async def ask() -> list[Sample]:
            async with asyncio.timeout(self._left()):
                return await ask_all(
                    running.url,
                    MODEL,
                    requests,
                    run.rate,
                    arrivals_of(run),
                    reports=running.reports,
                )

        samples = asyncio.run(ask())
        first, last = min(s.began for s in samples), max(s.began for s in samples)
        end = max([last, *(s.at[-1] for s in samples if s.at)])
        return samples, end - first or 1.0

    def _ask_with_vllm(
        self, run: Run, workload: Workload, running: Running
    ) -> tuple[list[Sample], float]:
        return run_vllm_client(
            running.url,
            MODEL,
            self._tokenizer,
            workload,
            run.rate,
            seed=random.getrandbits(31),
            folder=self._out / _file_name(run.topology) / "vllm-client" / _file_name(str(run)),
            limit_s=self._left(),
        )

    def _compare(self, name: str, running: Running) -> None:
        if self._left() < _SLACK_S:
            self._problem(f"{name}: answers were not compared, no time was left")
            return
        try:
            answers = exact.ask_exact(running.url, MODEL, reports=running.reports)
        except (httpx.HTTPError, LookupError, TypeError) as exc:
            self._problem(f"{name}: answers could not be compared: {exc}")
            return
        if self._reference is None:
            self._reference = name, answers
        found = exact.compare(name, answers, *self._reference)
        self._found.exact.append(found)
        self._write("exact.json", [c.to_json() for c in self._found.exact])
        self._progress(
            f"{name}: {found.same_tokens} of {found.requests} answers are those of "
            f"{found.reference}, {found.blocks_loaded} blocks loaded, "
            f"{found.blocks_recomputed} recomputed"
        )
        if differ := found.requests - found.same_tokens:
            self._problem(
                f"{name}: {differ} of {found.requests} answers differ from those of "
                f"{found.reference}"
            )

    def _left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _problem(self, text: str) -> None:
        self._progress(text)
        self._found.problems.append(text)
        self._write("problems.json", self._found.problems)

    def _write(self, name: str, content: Any) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        file = self._out / name
        # In one step: a run that is cut off in the middle leaves the file before.
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(file)


def check_devices(plan: Plan, names: Sequence[str], there: int) -> None:
    """Raises PdtasksError naming a topology that needs more than `there` devices."""
    for name in names:
        if (needed := plan.topologies[name].num_devices) > there:
            raise PdtasksError(
                f"topology {name!r} needs {needed} devices, this host has {there}: choose others "
                "with --topology"
            )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
