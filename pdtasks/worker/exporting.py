"""Where does a worker serve its metrics? On a port of its own, which its sign of life tells."""

from __future__ import annotations

import logging
import socket
from typing import Final

from prometheus_client import start_http_server

from pdtasks.settings import Settings

logger = logging.getLogger(__name__)

_ANY: Final = frozenset({"", "0.0.0.0", "::"})


class Exporter:
    """An HTTP server in a thread of its own, which answers `/metrics`."""

    def __init__(self, settings: Settings) -> None:
        """Raises OSError when `metrics_host` is no address of this host."""
        host, port = settings.metrics_host, settings.metrics_port
        try:
            self._server, _ = start_http_server(port, host)
        except OSError as exc:
            if not port:
                raise
            # Of several workers with the same settings one has it; the others are found as well.
            logger.warning("port %d for metrics: %s: a free one is taken", port, exc.strerror)
            self._server, _ = start_http_server(0, host)
        name = socket.gethostname() if host in _ANY else host
        shown = f"[{name}]" if ":" in name else name
        self.address = f"{shown}:{self._server.server_port}"

    def close(self) -> None:
        """Serve nothing more."""
        self._server.shutdown()
        self._server.server_close()
