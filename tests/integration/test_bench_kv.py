"""Does `pdtasks bench kv` measure every path with real servers, and leave nothing behind?"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pdtasks.bench import kv as module
from pdtasks.bench.kv import run_bench
from pdtasks.bench.links import LINKS
from pdtasks.errors import ConfigurationError

_SIZES = (1 << 16, 1 << 17)
_CONNECTIONS = (1, 2)


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Those that work in `folder`, or know it from their command line or environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            known = [process.cwd(), *process.cmdline(), *process.environ().values()]
            if any(str(folder) in part for part in known):
                found.append(process)
    return found


def test_a_short_run_has_every_figure_and_leaves_nothing_running(tmp_path: Path) -> None:
    # Given a folder for everything temporary, by which a forgotten process would be known
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = ["bench", "kv", "--json", str(tmp_path / "figures.json"), "--seconds", "0.05"]
    for size, connections in zip(_SIZES, _CONNECTIONS, strict=True):
        command += ["--size", str(size), "--connections", str(connections)]

    # When the command runs
    done = subprocess.run(
        [sys.executable, "-m", "pdtasks.cli", *command],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    # Then every path has a figure for each operation, size and number of connections
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())
    keys = ["path", "op", "value_bytes", "connections", "gb_per_s"]
    assert all(list(row) == keys for row in rows)
    measured = [tuple(row[key] for key in keys[:-1]) for row in rows]
    wanted = itertools.product(LINKS, ("put", "get"), _SIZES, _CONNECTIONS)
    assert sorted(measured) == sorted(wanted)
    assert all(row["gb_per_s"] > 0 for row in rows)
    # and the tables, the ratios and the progress were shown
    assert all(path in done.stdout for path in LINKS)
    assert "pdtasks-tcp / socket-tcp: put " in done.stdout
    assert done.stderr.count(" GB/s") == 2 * len(rows)
    # and the plot is a picture beside the figures
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    # and no server, peer or temporary folder is left
    assert _processes_of(temporary) == []
    assert list(temporary.iterdir()) == []


def test_a_missing_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PACKAGES", ("no_such_package",))

    with pytest.raises(
        ConfigurationError, match=r"no_such_package: `pip install 'pdtasks\[bench\]"
    ):
        run_bench(print, print, json_file=tmp_path / "figures.json")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no-folder"):
        run_bench(print, print, json_file=tmp_path / "no-folder" / "figures.json")
