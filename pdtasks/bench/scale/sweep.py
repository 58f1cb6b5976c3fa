"""What is asked of the model: sizes from one host to hundreds of GPUs, and splits of four GPUs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from pdtasks.bench.scale.bottleneck import (
    PLANNED,
    SHARE,
    Load,
    answers_at_once,
    best_split,
    capacity,
    demands,
    messages_of_request,
    needed,
)
from pdtasks.bench.scale.costs import GPU_HOST, Costs
from pdtasks.bench.scale.gpu import H200, Gpu
from pdtasks.bench.scale.system import SHORT_PROMPT, Layout, System, poisson
from pdtasks.bench.scale.validate import validate
from pdtasks.bench.serving.rows import summarise

#: Prompt and answer tokens: long prompts, and answers that are longer than their prompts.
WORKLOADS: Final = ((5000, 250), (200, 1000))
GPUS: Final = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Parts of which there may be more, or that have to do with the rest of them.
SERVICES: Final = ("api", "bus", "broker", "kv")

#: With API processes enough for all tokens of four engines, so that the splits are compared.
FOUR: Final = {
    "2P2D": Layout(prefill=2, decode=2, apis=4),
    "1P3D": Layout(prefill=1, decode=3, apis=4),
    "3P1D": Layout(prefill=3, decode=1, apis=4),
    "four colocated": Layout(both=4, apis=4),
}
#: Requests/s of four GPUs.
RATES: Final = {(5000, 250): (4, 8, 12, 16, 20), (200, 1000): (8, 16, 32, 48, 64)}

_SHOWN: Final = (
    *("ttft_mean_ms", "ttft_p99_ms", "gap_mean_ms", "gap_p99_ms", "itl_p50_ms", "itl_p99_ms"),
    *("e2e_mean_ms", "goodput", "output_tokens_per_s"),
)


def sweep_sizes(costs: Costs, gpu: Gpu = H200, sizes: Sequence[int] = GPUS) -> list[dict[str, Any]]:
    """For each workload and number of GPUs: how full one of each part is, and how many it takes."""
    rows = []
    for prompt, answer in WORKLOADS:
        for gpus in sizes:
            prefill, decode = best_split(gpus, prompt, answer, gpu)
            layout = Layout(prefill, decode, kv_servers=1)
            load = Load(SHARE * capacity(layout, prompt, answer, gpu), prompt, answer)
            enough = needed(load, layout, gpu, costs)
            alone = demands(load, layout, gpu, costs)
            # One API process would spare the one bus messages, and could not do its own part.
            alone["bus"] = demands(load, replace(enough, buses=1), gpu, costs)["bus"]
            messages = load.per_s * messages_of_request(load, enough, gpu)
            rows.append(
                {
                    "workload": f"{prompt}/{answer}",
                    "gpus": gpus,
                    "split": f"{prefill}P{decode}D",
                    "per_s": round(load.per_s, 2),
                    "tokens_per_s": round(load.per_s * answer),
                    "messages_per_s": round(messages),
                    # Were all answers of a decode engine one API process's.
                    "fewest_messages_per_s": round(
                        load.per_s * messages_of_request(load, layout, gpu)
                    ),
                    "streams": round(answers_at_once(load, decode, gpu) * decode),
                    "one_of_each": {name: round(alone[name], 3) for name in SERVICES},
                    "needed": {
                        "api": enough.apis,
                        "bus": enough.buses,
                        "kv": enough.kv_servers,
                        "broker_cores": math.ceil(load.per_s * costs.broker_request_s / PLANNED),
                    },
                }
            )
    return rows


def run_model(
    costs: Costs, results: Path, progress: Callable[[str], None], *, seconds: float
) -> dict[str, Any]:
    """All questions.

    Args:
        costs: of the machine that services and API processes run on.
        results: folder with the rows that were measured on GPUs.
        seconds: of arrivals in each simulation of a large stack.
    """
    progress("rows that were measured, beside the same modelled")
    sizes = sweep_sizes(costs)
    workloads = dict.fromkeys(row["workload"] for row in sizes)
    return {
        "validation": validate(results),
        "costs_us": {
            name.removesuffix("_s"): round(1e6 * value, 1)
            for name, value in asdict(costs).items()
            if name.endswith(("request_s", "token_s", "message_s"))
        },
        "sizes": sizes,
        "first_full": {workload: first_full(sizes, workload) for workload in workloads},
        "simulated": sweep_simulated(costs, progress, seconds=seconds),
        "four": sweep_four(progress),
        "rule": rule(),
    }


def first_full(rows: Sequence[dict[str, Any]], workload: str, key: str = "one_of_each") -> Any:
    """Of each part, where one of it is full: GPUs and requests/s, between two sizes."""
    own = [row for row in rows if row["workload"] == workload]
    found = {}
    for name in SERVICES:
        last = None
        for row in own:
            busy = row[key][name]
            if busy >= 1:
                if last is None:
                    at, rate = row["gpus"] / busy, row["per_s"] / busy
                else:
                    part = (1 - last[key][name]) / (busy - last[key][name])
                    at = last["gpus"] + part * (row["gpus"] - last["gpus"])
                    rate = last["per_s"] + part * (row["per_s"] - last["per_s"])
                found[name] = {"gpus": round(at, 1), "per_s": round(rate, 1)}
                break
            last = row
    return found


def simulate(
    layout: Layout,
    load: Load,
    costs: Costs,
    *,
    seconds: float,
    gpu: Gpu = H200,
    seed: int = 1,
    short_prompt: int = SHORT_PROMPT,
) -> dict[str, Any]:
    """What clients see, and how full each part was, by simulation of `seconds` of arrivals."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    number = max(1, round(load.per_s * seconds))
    asks = poisson(load.per_s, number, load.prompt, load.answer, rng)
    outcome = System(layout, gpu, costs, short_prompt=short_prompt).run(asks)
    figures = summarise(outcome.samples, load.answer, outcome.seconds)
    # Of those who came: the last answers come when nothing else is asked any more.
    figures["goodput"] = round(figures["goodput"] * outcome.seconds / number * load.per_s, 3)
    return {
        **{name: figures[name] for name in _SHOWN},
        "failed": figures["failed"],
        "utilisation": outcome.utilisation,
    }


def sweep_simulated(
    costs: Costs,
    progress: Callable[[str], None],
    *,
    sizes: Sequence[int] = (2, 8, 16, 32, 64, 128),
    seconds: float = 6.0,
    gpu: Gpu = H200,
) -> list[dict[str, Any]]:
    """What clients see as stacks grow: with one bus, and with as many as are needed."""
    rows = []
    prompt, answer = WORKLOADS[0]
    for gpus in sizes:
        prefill, decode = best_split(gpus, prompt, answer, gpu)
        layout = Layout(prefill, decode, kv_servers=1)
        load = Load(SHARE * capacity(layout, prompt, answer, gpu), prompt, answer)
        enough = needed(load, layout, gpu, costs)
        if gpus <= 8:  # one host: through rings
            enough = replace(enough, kv_servers=0)
        for case in dict.fromkeys((replace(enough, buses=1), enough)):
            figures = simulate(case, load, costs, seconds=seconds, gpu=gpu)
            rows.append({"gpus": gpus, "per_s": round(load.per_s, 2), **asdict(case), **figures})
            progress(
                f"{gpus} GPUs, {case.apis} API, {case.buses} bus: {load.per_s:.0f} requests/s, "
                f"TTFT {figures['ttft_mean_ms']} ms, ITL p99 {figures['itl_p99_ms']} ms"
            )
    return rows


def sweep_four(
    progress: Callable[[str], None], *, seconds: float = 20.0, costs: Costs = GPU_HOST
) -> list[dict[str, Any]]:
    """Splits of four GPUs of one host beside four engines that compute and answer."""
    rows = []
    for (prompt, answer), rates in RATES.items():
        for rate in rates:
            for name, layout in FOUR.items():
                load = Load(rate, prompt, answer)
                figures = simulate(layout, load, costs, seconds=seconds)
                row = {"topology": name, "workload": f"{prompt}/{answer}", "rate": rate}
                rows.append({**row, **figures})
            told = ", ".join(f"{r['topology']} {r['goodput']}" for r in rows[-len(FOUR) :])
            progress(f"four GPUs, {prompt}/{answer} at {rate}/s: good answers/s {told}")
    return rows


def rule(gpu: Gpu = H200) -> list[dict[str, Any]]:
    """How many prefill engines does a decode engine keep busy, and the best split of 4, 8, 16."""
    rows = []
    for prompt, answer in ((500, 500), (1000, 250), (2000, 200), (5000, 250), (8000, 1000)):
        ratio = gpu.answers_per_s(prompt, answer) / gpu.prompts_per_s(prompt)
        splits = {
            gpus: "{}P{}D".format(*best_split(gpus, prompt, answer, gpu)) for gpus in (4, 8, 16)
        }
        rows.append(
            {
                "workload": f"{prompt}/{answer}",
                "prompts_per_s": round(gpu.prompts_per_s(prompt), 2),
                "answers_per_s": round(gpu.answers_per_s(prompt, answer), 2),
                "prefill_for_each_decode": round(ratio, 2),
                "splits": splits,
            }
        )
    return rows
