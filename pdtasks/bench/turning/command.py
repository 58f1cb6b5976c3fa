"""`pdtasks bench turning`: on the running stack, or on one of its own with stub engines."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click
import httpx

from pdtasks.balance.deciding import Targets
from pdtasks.bench.asking import ask_stack
from pdtasks.bench.turning.plot import draw_turning
from pdtasks.bench.turning.run import Phase, run_turning
from pdtasks.cluster.console import Console
from pdtasks.errors import PdtasksError
from pdtasks.settings import load_settings

_STOP_S: Final = 10.0


def turning_command(
    phases: Sequence[Phase],
    *,
    seconds: float,
    targets: Targets,
    stub: tuple[int, int] | None,
    slower: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Run it.

    Args:
        seconds: of each phase.
        targets: shown beside the latencies; with `stub` the balancer's.
        stub: prefill and decode workers with stub engines to run, and a balancer; None: the stack
            that runs, with or without one.
        slower: how many times as long as a GPU those stubs take.
    """
    console = Console(sys.stderr)

    async def ask(client: httpx.AsyncClient, model: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await run_turning(
            client, model, phases, seconds, console.line
        )
        return found

    if stub is None:
        moments = ask_stack(load_settings(), ask)
    else:
        console.line("stub engines: they compute nothing, and take a GPU's times")
        moments = _on_stubs(stub, slower, targets, console, ask)
    if not moments:
        raise PdtasksError("nothing was seen: the phases were too short")
    last = moments[-1]
    click.echo(f"{last['ended']} requests ended, {last['failed']} of them failed")
    if json_file is not None:
        json_file.write_text(json.dumps(moments, indent=1) + "\n")
    if plot_file is not None:
        draw_turning(moments, plot_file, ttft_s=targets.ttft_s, itl_s=targets.itl_s)


def _on_stubs(
    workers: tuple[int, int], slower: float, targets: Targets, console: Console, ask: Any
) -> list[dict[str, Any]]:
    from pdtasks.bench.chaos.nursery import Nursery
    from pdtasks.bench.control.stack import private_services
    from pdtasks.bench.scale.stack import MODEL, ScaleStack

    home = Path(tempfile.mkdtemp(prefix="pdtasks-turning-"))
    with ExitStack() as ends:
        ends.callback(shutil.rmtree, home, ignore_errors=True)
        nursery = ends.enter_context(Nursery(home / "nursery.log"))
        services = ends.enter_context(private_services(home))
        stack = ends.enter_context(ScaleStack(home / "stack", services, nursery, slower=slower))
        stack.grow(*workers, 1, console.line)
        balancer = stack.balancer(ttft_s=targets.ttft_s, itl_s=targets.itl_s)
        balancer.start()
        ends.callback(balancer.stop, _STOP_S)

        async def run() -> list[dict[str, Any]]:
            async with httpx.AsyncClient(
                base_url=stack.urls[0], timeout=300, trust_env=False
            ) as client:
                found: list[dict[str, Any]] = await ask(client, MODEL)
                return found

        return asyncio.run(run())
