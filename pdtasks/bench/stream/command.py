"""`pdtasks bench stream`: a folder of its own, and what is shown in the end."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

import click

from pdtasks.bench.stream.report import format_report, to_json
from pdtasks.bench.stream.run import Plan, run_stream
from pdtasks.cluster.console import Console


def run_command(plan: Plan, json_file: Path | None) -> None:
    """Run `plan` on services of its own."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    with tempfile.TemporaryDirectory(prefix="pdtasks-stream-") as home:
        figures = to_json(run_stream(plan, Path(home), console.line))
    click.echo(format_report(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
