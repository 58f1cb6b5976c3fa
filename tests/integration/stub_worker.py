"""A real Celery worker of ours whose engine core is a stub.

App, queues, bootsteps, tasks, `Engine`, reply writer and presence are the product's.  Stubs are
what `stub_engine.py` has, and the look for a model; `pdtasks.bench.chaos.nursery` puts them there
in a process that it forks off, and runs this file in it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from tests.integration.steering import STALL_SIGNAL


def run_worker(argv: list[str]) -> None:
    """Be a worker until it ends."""
    from pdtasks.app import app
    from pdtasks.worker import liveness

    # The product's patience would make tests long.
    after_s = os.environ.get("STUB_STALLED_AFTER_S", str(liveness.STALLED_AFTER_S))
    vars(liveness).update(STALLED_AFTER_S=float(after_s), _SUPERVISOR_FIRST_S=0.0)
    # The handler runs in the main thread, which waits for what nobody gives.
    signal.signal(STALL_SIGNAL, lambda *_: _stand())
    app.worker_main(["worker", *argv])


def _stand() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


if __name__ == "__main__":
    run_worker(sys.argv[1:])
