"""What is shown of live runs, for people?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

_PARTS: Final = ("api", "prefill", "decode", "broker", "bus", "kv", "client")


def format_live(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: what came of each size, and what a request cost each part."""
    head = (
        *("size", "prompt/answer", "slower", "asked/s", "streams", "most", "tokens/s"),
        *("TTFT", "p99", "gap", "ITL p50", "p99", "failed", "host"),
    )
    lines = [
        (
            r["size"],
            f"{r['prompt']}/{r['answer']}",
            f"{r['slower']:g}",
            *(shown(r[name]) for name in ("offered_per_s", "streams")),
            str(r["streams_most"]),
            *(
                shown(r[name])
                for name in ("tokens_per_s", "ttft_mean_ms", "ttft_p99_ms", "gap_mean_ms")
            ),
            *(shown(r[name]) for name in ("itl_p50_ms", "itl_p99_ms")),
            str(r["failed"]),
            f"{r['host_cpu']:.0%}",
        )
        for r in rows
    ]
    costs = [
        (
            r["size"],
            f"{r['prompt']}/{r['answer']}",
            *(shown(r["cpu_ms_per_request"].get(part)) for part in _PARTS),
            shown(r["bus_messages_per_s"]),
            shown(r["bus_cpu_us_per_message"]),
        )
        for r in rows
    ]
    cost_head = ("CPU, ms a request", "", *_PARTS, "bus messages/s", "CPU of one, us")
    return f"{table(head, lines)}\n\n{table(cost_head, costs)}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first two from the left."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def shown(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def format_model(found: Mapping[str, Any]) -> str:
    """All that the model says, a table for each question."""
    return "\n\n".join(
        [
            "Measured on GPUs / modelled:\n" + _validation(found["validation"]),
            "Live on this kind of host, us of CPU: "
            + ", ".join(f"{name} {value}" for name, value in found["costs_us"].items()),
            "How full one of each is, and how many are needed:\n" + _sizes(found["sizes"]),
            "One of each is full at: " + _first(found["first_full"]),
            "Simulated, one bus and enough of them:\n" + _simulated(found["simulated"]),
            "Four GPUs:\n" + _four(found["four"]),
            "Prefill engines for each decode engine:\n" + _rule(found["rule"]),
        ]
    )


def _validation(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0]["measured"])
    lines = [
        (r["case"], "", *(f"{shown(r['measured'][n])} / {shown(r['modelled'][n])}" for n in names))
        for r in rows
    ]
    return table(("", "", *names), lines)


def _sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        *("prompt/answer", "GPUs", "split", "requests/s", "streams", "tokens/s", "messages/s"),
        *("API", "bus", "broker", "kv", "APIs", "buses", "kv servers", "broker cores"),
    )
    lines = [
        (
            *(r["workload"], str(r["gpus"]), r["split"]),
            *(shown(r[n]) for n in ("per_s", "streams", "tokens_per_s", "messages_per_s")),
            *(f"{r['one_of_each'][n]:.0%}" for n in ("api", "bus", "broker", "kv")),
            *(str(r["needed"][n]) for n in ("api", "bus", "kv", "broker_cores")),
        )
        for r in rows
    ]
    return table(head, lines)


def _first(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    return "; ".join(
        f"{workload}: "
        + ", ".join(
            f"{name} {at['gpus']:g} GPUs, {at['per_s']:g} requests/s" for name, at in own.items()
        )
        for workload, own in found.items()
    )


def _simulated(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("ttft_mean_ms", "ttft_p99_ms", "gap_mean_ms", "itl_p50_ms", "itl_p99_ms", "goodput")
    busy = ("api", "bus", "broker", "prefill")
    lines = [
        (
            *(str(r["gpus"]), f"{r['prefill']}P{r['decode']}D"),
            *(str(r[n]) for n in ("apis", "buses", "kv_servers")),
            *(shown(r[n]) for n in ("per_s", *names)),
            *(f"{r['utilisation'].get(n, 0):.0%}" for n in busy),
        )
        for r in rows
    ]
    head = ("GPUs", "split", "APIs", "buses", "kv servers", "requests/s", *names, *busy)
    return table(head, lines)


def _four(rows: Sequence[Mapping[str, Any]]) -> str:
    names = (
        *("ttft_mean_ms", "ttft_p99_ms", "gap_p99_ms", "itl_p50_ms", "itl_p99_ms", "e2e_mean_ms"),
        "goodput",
    )
    lines = [
        (r["workload"], r["topology"], shown(r["rate"]), *(shown(r[n]) for n in names))
        for r in rows
    ]
    return table(("prompt/answer", "topology", "requests/s", *names), lines)


def _rule(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        (
            *(r["workload"], ""),
            *(shown(r[n]) for n in ("prompts_per_s", "answers_per_s", "prefill_for_each_decode")),
            ", ".join(r["splits"].values()),
        )
        for r in rows
    ]
    head = ("prompt/answer", "", "prompts/s", "answers/s", "prefill for each decode")
    return table((*head, "best of 4, 8, 16 GPUs"), lines)
