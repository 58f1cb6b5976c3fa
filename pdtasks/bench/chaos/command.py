"""`pdtasks bench chaos`: a folder of its own, the plan, and what is shown in the end."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click

from pdtasks.bench.chaos.load import Mix
from pdtasks.bench.chaos.report import format_report, to_json
from pdtasks.bench.chaos.run import Plan, run_chaos
from pdtasks.bench.chaos.schedule import REAL_ENGINE_ONLY, Kind, make_schedule
from pdtasks.bench.chaos.stack import EngineKind
from pdtasks.cluster.console import Console

#: Engines that compute are slower, and their answers shorter.
_REAL_MIX = Mix(streams=3, plain=1, jobs=1, hang_ups=1, burst=6, burst_every_s=15.0)


def run_command(minutes: float, seed: int, engine: EngineKind, json_file: Path | None) -> int:
    """Returns the exit code."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    plan = make_plan(minutes, seed, engine)
    console = Console(sys.stderr)
    if engine == "stub":
        console.line("stub engines: they compute nothing, and repeat themselves")
    home = Path(tempfile.mkdtemp(prefix="pdtasks-chaos-"))
    kept = False
    try:
        found = run_chaos(plan, home, console)
        kept = not found.tally.bad
    finally:
        if kept:
            shutil.rmtree(home, ignore_errors=True)
        else:
            console.line(f"the logs are kept in {home / 'logs'}")
    click.echo(format_report(found, engine))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(found), indent=1) + "\n")
    return 0 if kept else 1


def make_plan(minutes: float, seed: int, engine: EngineKind) -> Plan:
    """The faults and the load of a seed."""
    kinds = set(Kind) - (REAL_ENGINE_ONLY if engine == "stub" else frozenset())
    seconds = 60 * minutes
    faults = make_schedule(seed, seconds, kinds)
    if engine == "stub":
        return Plan(faults, seconds, seed)
    return Plan(
        faults,
        seconds,
        seed,
        engine=engine,
        mix=_REAL_MIX,
        num_questions=12,
        longest=60,
        deadline_s=120.0,
        rehearse_at_once=2,
    )
