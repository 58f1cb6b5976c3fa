"""The order of a run: one side after the other, in short rounds, for machines are noisy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.load import Order
from pdtasks.bench.control.report import Round
from pdtasks.bench.control.stack import ControlStack, Services, Side, cpu_s
from pdtasks.bench.latency import p50_p99_ms


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    rounds: int = 5
    seconds: float = 3.0  #: of each side in a round: once with many in flight, once with one
    in_flight: int = 64
    threads: int = 64  #: of each worker
    prompt_tokens: int = 1000


def run_control(
    plan: Plan,
    home: Path,
    services: Services,
    progress: Callable[[str], None],
    nursery: Nursery | None = None,
) -> list[Round]:
    """Run `plan` with workers and clients of its own, under `home`. Main thread only.

    Raises StartFailed when one of them does not start, or fails.
    """
    with ControlStack(
        home,
        services,
        threads=plan.threads,
        prompt_tokens=plan.prompt_tokens,
        nursery=nursery,
    ) as stack:
        full = Order(plan.in_flight, plan.seconds)
        for side in stack.sides:
            side.client.do(full)  # connections come about, and code is run for the first time
        rounds: list[Round] = []
        for number in range(plan.rounds):
            # Who comes second finds a warmer machine, or a busier one.
            order = stack.sides if number % 2 == 0 else stack.sides[::-1]
            found = {side.name: _loaded(side, full, services) for side in order}
            for side in order:
                found[side.name] |= _alone(side, Order(1, plan.seconds))
            rounds.append({side.name: found[side.name] for side in stack.sides})
            told = (f"{s.name} {found[s.name]['chains_per_s']:.0f}/s" for s in stack.sides)
            progress(f"round {number + 1} of {plan.rounds}: {', '.join(told)}")
    return rounds


def _loaded(side: Side, order: Order, services: Services) -> dict[str, float]:
    def used() -> dict[str, float]:
        of_services = {
            f"{name}_cpu_ms": 1000 * cpu_s(pids) for name, pids in services.pids().items()
        }
        return {"cpu_ms_per_request": 1000 * side.cpu_s(), **of_services}

    before = used()
    done = side.client.do(order)
    after = used()
    p50, p99 = p50_p99_ms(done.took_s)
    return {
        "chains_per_s": done.per_s(order),
        "loaded_latency_ms_p50": p50,
        "loaded_latency_ms_p99": p99,
        **{name: (after[name] - before[name]) / len(done.took_s) for name in before},
    }


def _alone(side: Side, order: Order) -> dict[str, float]:
    p50, p99 = p50_p99_ms(side.client.do(order).took_s)
    return {"latency_ms_p50": p50, "latency_ms_p99": p99}
