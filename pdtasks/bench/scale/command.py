"""`pdtasks bench scale`: a folder of its own, and what is shown in the end."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import private_services
from pdtasks.bench.scale.costs import MEASURED, faster, from_rows
from pdtasks.bench.scale.live import LivePlan, run_live
from pdtasks.bench.scale.plot import draw_all
from pdtasks.bench.scale.report import format_live, format_model
from pdtasks.bench.scale.sweep import run_model
from pdtasks.cluster.console import Console
from pdtasks.errors import PdtasksError


def live_command(plan: LivePlan, json_file: Path | None) -> None:
    """Run `plan` on services of its own."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    console.line("stub engines: they compute nothing, and take a GPU's times")
    home = Path(tempfile.mkdtemp(prefix="pdtasks-scale-"))
    failed = False

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        if json_file is not None:
            part = json_file.with_suffix(".part")
            part.write_text(json.dumps(rows, indent=1) + "\n")
            part.replace(json_file)

    try:
        with Nursery(home / "nursery.log") as nursery, private_services(home) as services:
            rows = run_live(
                plan,
                home / "stack",
                services=services,
                nursery=nursery,
                progress=console.line,
                write=write,
            )
    except PdtasksError:
        failed = True
        console.line(f"the logs are kept in {home}")
        raise
    finally:
        if not failed:
            shutil.rmtree(home, ignore_errors=True)
    click.echo(format_live(rows))


def model_command(
    live_files: Sequence[Path],
    results: Path,
    *,
    times: float,
    seconds: float,
    json_file: Path | None,
    plot_folder: Path | None,
) -> None:
    """Ask the model everything, with costs of live rows."""
    rows = [row for file in live_files for row in json.loads(file.read_text())]
    try:
        costs = faster(from_rows(rows, MEASURED) if rows else MEASURED, times)
    except ValueError as exc:
        raise PdtasksError(f"these live rows tell no costs: {exc}") from exc
    found = run_model(costs, results, lambda line: click.echo(line, err=True), seconds=seconds)
    click.echo(format_model(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if plot_folder is not None:
        for picture in draw_all(found, plot_folder):
            click.echo(picture)
