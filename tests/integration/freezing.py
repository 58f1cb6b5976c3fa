"""A server that stands still for a while."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pdtasks.cluster.valkey import ValkeyServer


@contextmanager
def frozen(server: ValkeyServer) -> Iterator[None]:
    """It answers nobody meanwhile, and takes all that was said when it goes on."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
