"""Which part is full first, and how many of it are needed? By the utilisation law.

A part that a request keeps busy for S seconds is busy for X·S of each second at X requests/s, and
full where that is 1 (or the number of its servers).  That needs no simulation, only the demands;
what waits before a part is full is the simulation's business (`system`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from pdtasks.bench.scale.costs import Costs
from pdtasks.bench.scale.gpu import KV_BYTES_OF_TOKEN, Gpu
from pdtasks.bench.scale.system import SHORT_PROMPT, Layout

#: Part of what the GPUs can do that is asked of them: beyond, first tokens wait for long.
SHARE: Final = 0.7
#: A part is planned to be busy for so much of the time: beyond, everything waits for it.
PLANNED: Final = 0.7
#: GPUs of a host: hand-overs between hosts go through the kv servers.
GPUS_OF_HOST: Final = 8


@dataclass(frozen=True)
class Load:
    """Requests/s, and tokens of each."""

    per_s: float
    prompt: int
    answer: int


def answers_at_once(load: Load, decode: int, gpu: Gpu) -> float:
    """Of one decode engine: Little's law, with a step that is longer the more there are."""
    each = load.per_s / decode
    batch = 1.0
    for _ in range(100):
        kv = batch * (load.prompt + load.answer / 2)
        step = gpu.step_of(0, 0, 0, 0, saves=False) + batch * gpu.sequence_s + kv * gpu.kv_token_s
        batch = min(gpu.max_num_seqs, each * load.answer * step)
    return batch


def messages_of_request(load: Load, layout: Layout, gpu: Gpu) -> float:
    """Replies on the bus: each step makes one for each API process that has an answer in it."""
    batch = answers_at_once(load, layout.decode, gpu)
    # Of `batch` answers, each some API process's by chance: so many processes have one.
    apis: float = layout.apis * (1 - (1 - 1 / layout.apis) ** max(batch, 1.0))
    return 1 + load.answer * min(1.0, apis / max(batch, 1.0))


def demands(load: Load, layout: Layout, gpu: Gpu, costs: Costs) -> dict[str, float]:
    """Utilisation of each part, whose servers are those of `layout`. More than 1: it is full."""
    messages = messages_of_request(load, layout, gpu)
    api = costs.api_request_s + load.prompt * costs.api_prompt_token_s
    api += load.answer * costs.api_token_s + messages * costs.api_message_s
    hosts = math.ceil(layout.gpus / GPUS_OF_HOST)
    crossing = 1 - 1 / hosts  # RabbitMQ gives jobs to decode workers in turn, wherever they are
    # What decode workers compute themselves is stored for nobody.
    kv = load.prompt * KV_BYTES_OF_TOKEN if load.prompt > SHORT_PROMPT else 0
    kv_s = kv / costs.kv_put_bytes_per_s + crossing * kv / costs.kv_get_bytes_per_s
    return {
        "prefill": load.per_s / layout.prefill / gpu.prompts_per_s(load.prompt),
        "decode": load.per_s / layout.decode / gpu.answers_per_s(load.prompt, load.answer),
        "api": load.per_s * api / layout.apis,
        "bus": load.per_s * (costs.bus_request_s + messages * costs.bus_message_s) / layout.buses,
        "broker": load.per_s * costs.broker_request_s / costs.broker_cores,
        "kv": load.per_s * kv_s / max(1, layout.kv_servers),
    }


def best_split(gpus: int, prompt: int, answer: int, gpu: Gpu) -> tuple[int, int]:
    """Prefill and decode engines of so many GPUs that can do most together."""
    every = [(prefill, gpus - prefill) for prefill in range(1, gpus)]

    def most(split: tuple[int, int]) -> float:
        prefill, decode = split
        return min(prefill * gpu.prompts_per_s(prompt), decode * gpu.answers_per_s(prompt, answer))

    return max(every, key=most)


def capacity(layout: Layout, prompt: int, answer: int, gpu: Gpu) -> float:
    """Requests/s that the GPUs can do, whatever the other parts can."""
    return min(
        layout.prefill * gpu.prompts_per_s(prompt),
        layout.decode * gpu.answers_per_s(prompt, answer),
    )


def needed(load: Load, layout: Layout, gpu: Gpu, costs: Costs) -> Layout:
    """`layout` with as many API processes, buses and kv servers as keep each below `PLANNED`.

    More API processes make more messages, which may take more buses and more API processes.
    """
    while True:
        busy = demands(load, layout, gpu, costs)
        wanted = replace(
            layout,
            apis=_as_many(layout.apis, busy["api"]),
            buses=_as_many(layout.buses, busy["bus"]),
            kv_servers=_as_many(max(1, layout.kv_servers), busy["kv"]),
        )
        if wanted == layout:
            return layout
        layout = wanted


def _as_many(there: int, busy: float) -> int:
    """Never fewer: what is planned for one part must not change another's again and again."""
    return max(there, math.ceil(there * busy / PLANNED - 1e-9))
