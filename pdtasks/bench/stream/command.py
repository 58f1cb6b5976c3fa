"""`pdtasks bench stream`: a folder of its own, and what is shown in the end."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click

from pdtasks.bench.stream.report import format_report, to_json
from pdtasks.bench.stream.run import Plan, run_stream
from pdtasks.cluster.console import Console
from pdtasks.errors import PdtasksError


def run_command(plan: Plan, json_file: Path | None) -> None:
    """Run `plan` on services of its own."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    console.line("a stub engine: it computes nothing")
    home = Path(tempfile.mkdtemp(prefix="pdtasks-stream-"))
    failed = False
    try:
        figures = to_json(run_stream(plan, home, console.line))
    except PdtasksError:
        failed = True
        console.line(f"the logs are kept in {home}")
        raise
    finally:
        if not failed:
            shutil.rmtree(home, ignore_errors=True)
    click.echo(format_report(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
