"""How does Prometheus find what it is to scrape? It asks an API process, which knows all.

Ports of workers are free ones and change with each start: so they are asked for again and again.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from pdtasks.keys import asks_for_keys
from pdtasks.messages import WorkerStatus
from pdtasks.running_stack import running_stack
from pdtasks.settings import Settings

#: The route that tells Prometheus which API processes and workers there are.
PATH: Final = "/pdtasks/targets"


def targets(workers: Iterable[WorkerStatus]) -> list[dict[str, Any]]:
    """Prometheus' http_sd: one group for each worker that serves metrics.

    `instance` is the worker's name, which stays the same when its port changes.
    """
    return [
        {
            "targets": [worker.metrics],
            "labels": {"instance": worker.name, "role": worker.role, "model": worker.model},
        }
        for worker in workers
        if worker.metrics
    ]


def api_targets(addresses: Iterable[str]) -> list[dict[str, Any]]:
    """The same of API processes, which have a job of their own: vLLM's names are there alone."""
    return [
        {"targets": [address], "labels": {"job": "pdtasks-api", "role": "api"}}
        for address in addresses
    ]


def address_of(settings: Settings) -> str:
    """`host:port` at which others find this API process's metrics."""
    everywhere = settings.api_host in ("0.0.0.0", "::")
    host = socket.gethostname() if everywhere else settings.api_host
    return f"[{host}]:{settings.api_port}" if ":" in host else f"{host}:{settings.api_port}"


def configuration_of(settings: Settings) -> str:
    """`scrape_configuration` of the stack that runs here, or of the API that is configured."""
    stack = running_stack(settings.home)
    urls = stack.urls.get("api", "").split(",") if stack else []
    urls = [url for url in urls if url] or [f"http://{settings.api_host}:{settings.api_port}"]
    return scrape_configuration(urls, asks_for_keys=asks_for_keys(settings))


def scrape_configuration(api_urls: Sequence[str], *, asks_for_keys: bool) -> str:
    """What belongs into prometheus.yml.

    Args:
        api_urls: of API processes; any of them knows all others and all workers.
    """
    key = (
        """
        authorization:  # the file holds a key of the API: `pdtasks keys new prometheus`
          type: Bearer  # said, for Prometheus 2.42 sends the bare key here otherwise
          credentials_file: /etc/prometheus/pdtasks-api-key"""
        if asks_for_keys
        else ""
    )
    # What several of them name is scraped once.
    asked = "".join(
        f"""
      - url: {urlsplit(url).scheme}://{urlsplit(url).netloc}{PATH}
        refresh_interval: 10s{key}"""
        for url in api_urls
    )
    return f"""\
scrape_configs:
  - job_name: pdtasks-workers  # API processes are found too, as job pdtasks-api
    http_sd_configs:{asked}
"""
