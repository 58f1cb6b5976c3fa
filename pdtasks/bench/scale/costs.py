"""What do a request, a token and a message cost each part of a stack?

From live rows (`live`), in time of one core of the machine that they were taken on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds of one core, unless something else is said.

    Defaults: two shared cores (AVX2), rows of `2026-11-30-scale-live.json` unless something else is
    named.  What a message costs falls with their number, for a busy process finds several when it
    looks: where parts are full it is the busiest row that counts.
    """

    #: 200/25 at 8P8D: 15.4 ms, less its tokens.
    api_request_s: float = 0.010
    #: Beside that, for each token of the prompt: 5000/10, 21 to 26 ms.
    api_prompt_token_s: float = 2.5e-6
    #: `bench stream` (docs/performance.md), 192 us less worker and bus: each token an event of its
    #: own, as with engines.  (In live rows of full hosts late tokens share an event.)
    api_token_s: float = 168e-6
    #: One engine step's tokens for one API process: half of what a writer and a reader use for one
    #: (`2026-11-30-scale-bus.json`).
    api_message_s: float = 25e-6
    #: Beside its messages: `bench control` at 296 a second, 150 us with three of them.
    bus_request_s: float = 100e-6
    #: `2026-11-30-scale-bus.json`, 16 and 64 writers: 9 to 15 us at 19,000 a second (in another run
    #: 12 to 23 at 11,000 to 17,000).
    bus_message_s: float = 15e-6
    #: Both hops: `bench control` (docs/performance.md) at 296 a second; 4.0 ms at 30 a second.
    broker_request_s: float = 0.001
    broker_cores: int = 4  #: of the host that RabbitMQ has for itself
    worker_request_s: float = 0.012  #: both stages: 200/25 at 8P8D, less its steps
    #: Bytes/s of one kv server beside running engines (docs/performance.md, "From GPU memory to
    #: Valkey and back").
    kv_put_bytes_per_s: float = 5.1e9
    kv_get_bytes_per_s: float = 7.2e9
    #: Part of a put that is done before the prompt's end (docs/performance.md, "A hand-over between
    #: two engines", four chunks).
    kv_hidden: float = 0.76
    #: Latency beside the times above: from API to prefill worker (`stages_ms`, prefill, queue), and
    #: from first token to where the decode engine schedules it (docs/performance.md, "Where it
    #: goes now").
    publish_s: float = 0.003
    handover_s: float = 0.007


#: Of the machine that docs/scaling.md has its live rows from.
MEASURED: Final = Costs()

#: Of the hosts with H200 on which the rows of bench/results were measured, for `validate` alone:
#: chosen so that the model meets TTFT and gap of 200/500, 64 at once, and of 128/8.  Broker and bus
#: are far from full there, and what they cost hardly matters.
GPU_HOST: Final = Costs(
    api_request_s=0.0045,
    api_prompt_token_s=0.5e-6,
    api_token_s=45e-6,
    bus_request_s=0.0001,
    bus_message_s=30e-6,
    broker_request_s=0.001,
    worker_request_s=0.0012,
    publish_s=0.0025,
    handover_s=0.007,
)


def faster(costs: Costs, times: float) -> Costs:
    """`costs` on cores that are so many times as fast."""
    own = ("request_s", "token_s", "message_s")
    return replace(
        costs, **{n: value / times for n, value in vars(costs).items() if n.endswith(own)}
    )


def from_rows(rows: Sequence[Mapping[str, Any]], base: Costs) -> Costs:
    """`base` with what live rows tell: the costs, none below zero, that meet all rows best.

    Rows with different answers, and different numbers of tokens in a message, tell requests,
    tokens and messages apart. Raises ValueError when they are too few.
    """
    if len(rows) < len(_API):
        raise ValueError(f"{len(rows)} rows are too few to tell requests from tokens and messages")
    api = _fit(rows, ("api",), _API)
    bus = _fit(rows, ("bus",), ("requests", "messages"))
    broker = _fit(rows, ("broker",), ("requests",))
    workers = _fit(rows, ("prefill", "decode"), ("requests", "tokens", "messages"))
    return replace(
        base,
        api_request_s=api[0],
        api_prompt_token_s=0.0,  # is in the request's
        api_token_s=api[1],
        api_message_s=api[2],
        bus_request_s=bus[0],
        bus_message_s=bus[1],
        broker_request_s=broker[0],
        worker_request_s=workers[0],
    )


_API: Final = ("requests", "tokens", "messages")


def _fit(
    rows: Sequence[Mapping[str, Any]], parts: Sequence[str], causes: Sequence[str]
) -> list[float]:
    """Seconds of these parts' CPU that each of `causes` costs: least squares of relative errors."""
    used = [sum(float(row["cpu_ms_per_request"][part]) for part in parts) / 1e3 for row in rows]
    counts = np.array(
        [[_count(row, c) / u for c in causes] for row, u in zip(rows, used, strict=True) if u]
    )
    return least_squares(counts, np.ones(len(counts)))


def least_squares(counts: np.ndarray, used: np.ndarray) -> list[float]:
    """Prices, none below zero, with `counts @ prices` nearest to `used`.

    Of so few causes all subsets are tried: where the best price of one is below zero, it is zero.
    """
    best = [0.0] * counts.shape[1]
    least = float(used @ used)
    for size in range(1, counts.shape[1] + 1):
        for subset in itertools.combinations(range(counts.shape[1]), size):
            prices, *_ = np.linalg.lstsq(counts[:, subset], used, rcond=None)
            off = counts[:, subset] @ prices - used
            if (prices >= 0).all() and float(off @ off) < least - 1e-12:
                least = float(off @ off)
                best = [0.0] * counts.shape[1]
                for cause, price in zip(subset, prices, strict=True):
                    best[cause] = float(price)
    return best


def _count(row: Mapping[str, Any], cause: str) -> float:
    """For one request."""
    if cause == "messages":
        return float(row["bus_messages"]) / float(row["answered"])
    return float(row["answer"]) if cause == "tokens" else 1.0
