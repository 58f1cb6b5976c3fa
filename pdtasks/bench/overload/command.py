"""`pdtasks bench overload`: a folder of its own, and what is shown in the end."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

import click

from pdtasks.bench.overload.report import format_report, to_json
from pdtasks.bench.overload.run import Plan, run_overload
from pdtasks.cluster.console import Console


def run_command(seconds: float, times: float, json_file: Path | None) -> int:
    """Returns the exit code."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    console.line("stub engines: they compute nothing")
    with tempfile.TemporaryDirectory(prefix="pdtasks-overload-") as home:
        plan = Plan(seconds=seconds, times=times, come_again_s=seconds)
        found = run_overload(plan, Path(home), console)
    click.echo(format_report(found))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(found), indent=1) + "\n")
    return 1 if found.is_bad else 0
