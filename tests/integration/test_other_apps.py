"""Can a program with a Celery app of its own publish through pdtasks, and stay itself?"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.integration.conftest import ROOT, Services

PROGRAM = """
import threading

from celery import Celery, current_app

mine = Celery("mine", broker="memory://", backend="cache+memory://")

@mine.task
def double(n):
    return 2 * n

from pdtasks.pipeline import submit            # the README's Python API
from pdtasks.app import app

assert current_app.main == "mine", current_app.main
assert app.main == "pdtasks"

import sys
for module in ("vllm", "torch", "pdtasks.worker"):
    assert module not in sys.modules, module

# A worker of the other app, of another pool, in the same process
from celery.contrib.testing.worker import start_worker
with start_worker(mine, pool="solo", perform_ping_check=False):
    assert double.delay(21).get(timeout=10) == 42

worker = mine.Worker(pool="solo", queues=["celery"])
assert type(worker).__mro__[1].__module__ == "celery.apps.worker", type(worker).__mro__
from celery.worker.control import Panel
assert "pdtasks_abort" not in Panel.data

# and what is published goes to pdtasks' queues
print("id", submit("hello", max_tokens=1).id)
"""


def test_a_foreign_apps_worker_runs_beside_our_publisher(services: Services) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=env | services.env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("id ")
