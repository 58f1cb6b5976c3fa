"""How does Prometheus find what it is to scrape? API processes by name, workers through the API.

Ports of workers are free ones and change with each start: so they are asked for again and again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from pdtasks.keys import asks_for_keys
from pdtasks.messages import WorkerStatus
from pdtasks.running_stack import running_stack
from pdtasks.settings import Settings

#: The route that tells Prometheus which workers there are.
PATH: Final = "/pdtasks/targets"


def targets(workers: Iterable[WorkerStatus]) -> list[dict[str, Any]]:
    """Prometheus' http_sd: one group for each worker that serves metrics.

    `instance` is the worker's name, which stays the same when its port changes.
    """
    return [
        {"targets": [worker.metrics], "labels": {"instance": worker.name, "role": worker.role}}
        for worker in workers
        if worker.metrics
    ]


def configuration_of(settings: Settings) -> str:
    """`scrape_configuration` of the stack that runs here, or of the API that is configured."""
    stack = running_stack(settings.home)
    urls = stack.urls.get("api", "").split(",") if stack else []
    urls = [url for url in urls if url] or [f"http://{settings.api_host}:{settings.api_port}"]
    return scrape_configuration(urls, asks_for_keys=asks_for_keys(settings))


def scrape_configuration(api_urls: Sequence[str], *, asks_for_keys: bool) -> str:
    """What belongs into prometheus.yml.

    Args:
        api_urls: of every API process; any of them knows all workers.
    """
    apis = ", ".join(f'"{urlsplit(url).netloc}"' for url in api_urls)
    first = urlsplit(api_urls[0])
    key = (
        """
        authorization:  # the file holds a key of the API: `pdtasks keys new prometheus`
          credentials_file: /etc/prometheus/pdtasks-api-key"""
        if asks_for_keys
        else ""
    )
    return f"""\
scrape_configs:
  - job_name: pdtasks-api
    scheme: {first.scheme}
    static_configs:
      - targets: [{apis}]
  - job_name: pdtasks-workers
    http_sd_configs:
      - url: {first.scheme}://{first.netloc}{PATH}
        refresh_interval: 10s{key}
"""
