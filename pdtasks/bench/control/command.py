"""`pdtasks bench control`: a folder of its own, and what is shown in the end."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

import click

from pdtasks.bench.control.report import format_report, to_json
from pdtasks.bench.control.run import Plan, run_control
from pdtasks.bench.control.stack import private_services
from pdtasks.cluster.console import Console


def run_command(plan: Plan, json_file: Path | None) -> None:
    """Run `plan` on services of its own."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    with tempfile.TemporaryDirectory(prefix="pdtasks-control-") as name:
        home = Path(name)
        with private_services(home) as services:
            figures = to_json(run_control(plan, home, services, console.line))
    click.echo(format_report(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
