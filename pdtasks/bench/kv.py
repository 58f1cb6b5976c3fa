"""How fast do KV blocks cross to Valkey and back, beside the limit and other clients?

All in one run, because machines differ and so does one machine from minute to minute.  For each
size and number of connections all paths are measured right after each other, that twice, and of
each path's two figures the better one counts: noise only ever takes away.  A figure is the payload
of all connections over the time from the first one's start to the last one's end.

The servers are our own: one on a unix socket, one on TCP, with the settings of a private kv server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import valkey

from pdtasks.bench.links import LINKS, Ends, OpenLink
from pdtasks.bench.peer import Peer
from pdtasks.bench.report import OPS, Row, format_report, format_size, to_json
from pdtasks.cluster.valkey import ValkeyServer, io_threads
from pdtasks.errors import ConfigurationError

SIZES = tuple(mib << 20 for mib in (1, 2, 4, 8, 16))
CONNECTIONS = (1, 4, 8)
SECONDS = 1.0
PASSES = 2

#: Names that each thread writes and reads in turn; they bound what a server has to keep.
_RING = 4
#: Values that a row moves at least, however slow it is.
_LEAST = 8
#: Modules without which a path or the plot would be left out.
_PACKAGES = ("matplotlib", "glide_sync", "libvalkey")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class _Span:
    """What one thread did."""

    began: float
    ended: float
    values: int


def run_bench(
    progress: Tell,
    show: Tell,
    *,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    seconds: float = SECONDS,
    sizes: Sequence[int] = (),
    connections: Sequence[int] = (),
) -> None:
    """Measure, show tables and ratios, write the files.

    Args:
        progress: is told each figure as it comes.
        show: is told the report.
        json_file: None: not written.
        plot_file: None: beside the JSON file, or bench-kv.png here.
        sizes, connections: see `measure`; none given: as many as there are by default.

    Raises ConfigurationError, before anything is measured, when something is missing.
    """
    _require_packages()
    plot_file = plot_file or (json_file or Path("bench-kv")).with_suffix(".png")
    for file in (plot_file, json_file or plot_file):
        if not os.access(file.parent, os.W_OK):
            raise ConfigurationError(f"{file.parent} cannot be written: name another folder")
    rows = measure(
        progress,
        seconds=seconds,
        sizes=sizes or SIZES,
        connections=connections or CONNECTIONS,
    )
    show(format_report(rows))
    if json_file is not None:
        json_file.write_text(to_json(rows))
        progress(f"figures: {json_file}")
    from pdtasks.bench.plot import draw

    draw(rows, plot_file)
    progress(f"plot: {plot_file}")


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the benchmark needs {', '.join(missing)}: `pip install 'pdtasks[bench]'`"
        )


def measure(
    progress: Tell, *, sizes: Sequence[int], connections: Sequence[int], seconds: float
) -> list[Row]:
    """Measure every path.

    Args:
        progress: is told each figure.
        sizes: bytes of the payloads.
        connections: numbers of connections, each with a thread.
        seconds: how long one figure is measured, beyond the least number of values.

    Raises StartFailed.
    """
    best: dict[tuple[str, str, int, int], float] = {}
    # Twice what the rings hold: nothing is evicted while it is measured.
    with _ends(max(256 << 20, 2 * _RING * max(connections) * max(sizes))) as ends:
        for size, count in itertools.product(sizes, connections):
            for number, (path, open_link) in itertools.product(range(PASSES), LINKS.items()):
                for op, figure in _measure_path(open_link, ends, size, count, seconds).items():
                    row = (path, op, size, count)
                    best[row] = max(best.get(row, 0.0), figure)
                    progress(
                        f"{format_size(size):>7} × {count}, pass {number + 1} of {PASSES}: "
                        f"{path:<19} {op} {figure:6.2f} GB/s"
                    )
    return [Row(*row, figure) for row, figure in best.items()]


@contextlib.contextmanager
def _ends(maxmemory: int) -> Iterator[Ends]:
    """Both servers and the peer, started; stopped at the end."""
    with contextlib.ExitStack() as started:
        folder = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="pdtasks-bench-")))
        unix = started.enter_context(ValkeyServer(folder, "kv", maxmemory=maxmemory))
        # Of the private servers only the bus listens on TCP; with these it is a kv server.
        tcp = started.enter_context(ValkeyServer(folder, "bus", maxmemory=maxmemory))
        with valkey.Valkey.from_url(tcp.operator_url) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.config_set("io-threads", io_threads(len(os.sched_getaffinity(0))))
            client.config_set("client-output-buffer-limit", "normal 1gb 256mb 10")
        peer = started.enter_context(Peer(folder / "peer.sock"))
        yield Ends(unix.url, tcp.operator_url, peer.path, peer.port)


def _measure_path(
    open_link: OpenLink, ends: Ends, size: int, connections: int, seconds: float
) -> dict[str, float]:
    """GB/s of put and of get, each after a value that is not counted."""
    together = threading.Barrier(connections)
    least = -(-_LEAST // connections)

    def run(thread: int) -> list[_Span]:
        keys = [f"pd:kv:bench:{thread}:{number}" for number in range(_RING)]
        spans = []
        try:
            with contextlib.closing(open_link(ends, size)) as link:
                for move in (link.put, link.get):
                    if move == link.get:
                        for key in keys:  # a slow put has not been round the ring
                            link.put(key)
                    move(keys[0])
                    together.wait()
                    spans.append(_repeat(move, keys, seconds, least))
                    together.wait()
        except BaseException:
            together.abort()  # or the other threads would wait for this one
            raise
        return spans

    with ThreadPoolExecutor(connections, thread_name_prefix="bench") as threads:
        running = [threads.submit(run, number) for number in range(connections)]
    errors = [error for future in running if (error := future.exception())]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error  # the first cause, not what followed from it
    spans_of = zip(*(future.result() for future in running), strict=True)
    return {op: _rate(spans, size) for op, spans in zip(OPS, spans_of, strict=True)}


def _repeat(move: Callable[[str], None], keys: Sequence[str], seconds: float, least: int) -> _Span:
    began = now = time.perf_counter()
    values = 0
    while values < least or now - began < seconds:
        move(keys[values % len(keys)])
        values += 1
        now = time.perf_counter()
    return _Span(began, now, values)


def _rate(spans: Sequence[_Span], size: int) -> float:
    seconds = max(span.ended for span in spans) - min(span.began for span in spans)
    return size * sum(span.values for span in spans) / seconds / 1e9
