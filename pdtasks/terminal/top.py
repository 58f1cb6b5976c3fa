"""`pdtasks top`: what goes on, in a terminal, again and again."""

from __future__ import annotations

import sys
import time
from typing import Final

import click
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdtasks.naming import DECODE, PREFILL
from pdtasks.overview import Overview, Quantiles, RequestView
from pdtasks.terminal.asking import Client, NoAnswer
from pdtasks.terminal.figures import NOTHING, duration, share, size, sparkline

_STATES: Final = {
    "ready": "green",
    "starting": "cyan",
    "draining": "yellow",
    "changing": "yellow",
    "stalled": "red",
}
#: What waits is dim, what computes has the colour of its stage.
_SEGMENTS: Final = (
    ("queue_s", "·", "dim"),
    ("prefill_s", "█", "blue"),
    ("handover_s", "▒", "yellow"),
    ("decode_s", "█", "green"),
)
_FAILED: Final = "red"
_WIDE: Final = 100  #: columns from which requests have their bars
#: Columns and requests of what is no terminal.
_PLAIN_COLUMNS: Final = 120
_PLAIN_REQUESTS: Final = 10
_MOST_REQUESTS: Final = 50
_BAR: Final = 30


def run_top(
    url: str | None, *, every_s: float, once: bool, as_json: bool, console: Console | None = None
) -> None:
    """Show it until Ctrl-C, or once. Raises NoAnswer when nobody answers at the beginning."""
    client = Client(url)
    try:
        found = client.overview(_MOST_REQUESTS)
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
        elif once:
            width = None if sys.stdout.isatty() else _PLAIN_COLUMNS
            console = console or Console(width=width, highlight=False)
            console.print(render(found, console, requests=_PLAIN_REQUESTS))
        else:
            _watch(client, found, every_s, console or Console(highlight=False))
    finally:
        client.close()


def _watch(client: Client, found: Overview, every_s: float, console: Console) -> None:
    problem = ""

    def picture() -> RenderableType:
        # Asked at each refresh: the terminal may have another size by now.
        return render(found, console, problem=problem)

    with Live(get_renderable=picture, console=console, screen=True, refresh_per_second=4) as live:
        try:
            while True:
                time.sleep(every_s)
                try:
                    found, problem = client.overview(_MOST_REQUESTS), ""
                except NoAnswer as exc:
                    problem = str(exc)  # the last picture stays, and says so
                live.refresh()
        except KeyboardInterrupt:
            return


def render(
    found: Overview, console: Console, *, requests: int | None = None, problem: str = ""
) -> RenderableType:
    """All of `found`. `requests`: so many at most; None: as many as `console` has lines for."""
    width = console.width
    parts: list[RenderableType] = [_head(found)]
    parts += [Text(f"! {one}", style=_FAILED) for one in (problem, *found.problems) if one]
    parts += [Text(), _workers(found), Text(), _queues(found), Text(), _latencies(found, width)]
    if requests is None:
        used = len(console.render_lines(Group(*parts)))
        requests = max(0, console.height - used - 2)  # an empty line and the head
    if found.requests and requests:
        parts += [Text(), _requests(found.requests[:requests], width)]
    return Group(*parts)


def _head(found: Overview) -> Text:
    api, window, kv = found.api, found.window, found.window.kv
    at = time.strftime("%H:%M:%S", time.localtime(found.at))
    head = Text.assemble(
        ("pdtasks ", "bold"), f"{api.version}  {api.model}  {at}",
        (f"   API process {api.pid} on {api.host}, up {duration(found.at - api.since)}"
         + (f"; with {len(found.others)} more" if found.others else ""), "dim"),
    )  # fmt: skip
    flight, span = found.in_flight, duration(window.seconds)
    loaded, lost = kv.blocks_loaded, kv.blocks_recomputed
    jobs = found.jobs
    head.append(
        f"\nin flight  {flight.in_line} in line, {flight.prefill} prefill, "
        f"{flight.handover} hand-over, {flight.decode} decode; "
        f"jobs  {jobs.running} run, {jobs.waiting} wait"
        f"\nlast {span}  {window.requests} requests, {window.failed} failed, "
        f"{window.tokens_per_s:.0f} tokens/s"
        f"\nKV  {size(kv.bytes_written)} written, {size(kv.bytes_loaded)} loaded, "
        f"{share(loaded, loaded + lost)} of {loaded + lost} blocks handed over as they were, "
        f"{share(kv.cached_tokens, kv.prompt_tokens)} of prompt tokens cached"
    )
    for store in found.stores:
        of = f" of {size(store.max_bytes)}" if store.max_bytes else ""
        head.append(f"\nstore  {size(store.used_bytes)}{of}, {store.evicted} evicted")
    return head


def _table(*columns: str, right: frozenset[str] = frozenset()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return table


def _workers(found: Overview) -> RenderableType:
    if not found.workers:
        return Text("no worker shows a sign of life", style=_FAILED)
    columns = ("worker", "role", "device", "busy", "slots", "kv", "up", "state")
    table = _table(*columns, right=frozenset({"busy", "slots", "kv", "up"}))
    for worker in found.workers:
        state = worker.state + (f": {worker.reason}" if worker.reason else "")
        table.add_row(
            *(worker.name, worker.role, worker.device or NOTHING),
            *(str(worker.active), str(worker.slots), f"{worker.kv_usage:.0%}"),
            duration(found.at - worker.since),
            Text(state, style=_STATES.get(worker.state, "")),
        )
    return table


def _queues(found: Overview) -> Table:
    columns = ("queue", "waiting", "consumers", "oldest")
    table = _table(*columns, right=frozenset(columns[1:]))
    for queue in found.queues:
        counts = (queue.ready, queue.consumers)
        table.add_row(
            queue.name,
            *(NOTHING if count is None else str(count) for count in counts),
            duration(queue.oldest_s),
        )
    return table


def _latencies(found: Overview, width: int) -> Table:
    window = found.window
    rows: tuple[tuple[str, Quantiles, str], ...] = (
        ("first token", window.ttft, "ttft_p50_s"),
        ("gap to the second", window.gap, "gap_p50_s"),
        ("between tokens", window.itl, "itl_p50_s"),
        ("whole answer", window.end_to_end, ""),
    )
    columns = ("latency", "p50", "p95", "p99", "number", "median over time")
    table = _table(*columns, right=frozenset(columns[1:5]))
    for name, figures, series in rows:
        values = [getattr(slot, series) for slot in window.slots] if series else []
        table.add_row(
            name,
            *(duration(q) for q in (figures.p50_s, figures.p95_s, figures.p99_s)),
            str(figures.count),
            sparkline(values, max(10, width - 66)),
        )
    return table


def _requests(requests: tuple[RequestView, ...], width: int) -> Table:
    is_wide = width >= _WIDE
    columns = ["request", "state", "prompt", "out", "first", "gap", "total"]
    right = frozenset(columns[2:])
    table = _table(*columns, *(["way"] if is_wide else []), right=right)
    longest = max((r.seconds for r in requests), default=0.0)
    for request in requests:
        gap = (request.second_s or 0.0) - (request.first_s or 0.0)
        cells: list[RenderableType] = [
            Text(request.id[:28], overflow="ellipsis"),
            Text(request.state, style="" if request.state in _KNOWN else _FAILED),
            *(str(request.prompt_tokens), str(request.output_tokens)),
            *(duration(request.first_s), duration(gap if request.second_s else None)),
            duration(request.seconds),
        ]
        table.add_row(*cells, *([_bar(request, longest)] if is_wide else []))
    return table


_KNOWN: Final = ("line", PREFILL, "handover", DECODE, "done", "stopped")


def _bar(request: RequestView, longest_s: float) -> Text:
    """Its way through the stages; all bars have one scale."""
    bar = Text()
    done = 0.0
    for name, sign, style in _SEGMENTS:
        before, done = done, done + getattr(request.way, name)
        columns = round(done / longest_s * _BAR) - round(before / longest_s * _BAR)
        bar.append(sign * columns, style)
    return bar
