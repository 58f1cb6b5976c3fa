"""What do tests of metrics do alike? They scrape, and let `promtool` look at it."""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

PROMTOOL: Final = shutil.which("promtool") or "promtool"  # Debian's package `prometheus`

Samples = dict[str, float]


def scrape(address: str) -> str:
    """What `/metrics` of `host:port` says."""
    response = httpx.get(f"http://{address}/metrics", timeout=30)
    response.raise_for_status()
    return response.text


def samples(text: str) -> Samples:
    """Each sample by its name and labels as they are written: `name{a="b"}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def complaints(text: str) -> list[str]:
    """What `promtool` has to say of our own metrics; vLLM's names are vLLM's."""
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert "error while linting" not in checked.stderr, checked.stderr
    said = (checked.stdout + checked.stderr).splitlines()
    return [line for line in said if line.startswith("pdtasks")]


def families(text: str) -> set[str]:
    """Names of all metrics, those without a sample among them; a counter's with its `_total`."""
    described = (line.split() for line in text.splitlines() if line.startswith("# TYPE "))
    return {name for _, _, name, _ in described}
