"""What does vLLM's own client (`vllm bench serve`) say of the same load?

It runs as a process of its own; each request's times are in the file that it writes, so that both
clients' figures are made the same way.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pdtasks.bench.serving.client import Sample
from pdtasks.bench.serving.plan import Workload
from pdtasks.errors import PdtasksError

# Not `vllm bench serve`: that command asks for a distribution named vllm, and the one for CPUs has
# another name.
_PROGRAM = """\
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class ClientFailed(PdtasksError):
    """vLLM's client did not finish."""


def can_ask(workload: Workload) -> bool:
    """Its random prompts are all of one length."""
    return workload.short is None


def run_vllm_client(
    url: str,
    model: str,
    tokenizer: str,
    workload: Workload,
    rate: float,
    *,
    seed: int,
    folder: Path,
    limit_s: float,
) -> tuple[list[Sample], float]:
    """Samples, and the seconds that they took. Writes into `folder`. Raises ClientFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    command = [
        *(sys.executable, "-c", _PROGRAM, "--backend", "openai", "--base-url", url),
        *("--endpoint", "/v1/completions", "--model", model, "--tokenizer", tokenizer),
        *("--dataset-name", "random", "--random-input-len", str(workload.prompt)),
        *("--random-prefix-len", str(workload.shared_prefix)),
        *("--random-output-len", str(workload.answer), "--ignore-eos", "--temperature", "0.8"),
        *("--num-prompts", str(workload.num_requests(rate)), "--seed", str(seed)),
        *("--request-rate", f"{rate:g}" if rate else "inf", "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-dir", str(folder)),
        *("--result-filename", result.name),
    ]
    with (folder / "client.log").open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            raise ClientFailed(
                f"vLLM's client did not finish within {limit_s:.0f} s: see {log.name}"
            ) from None
    if code != 0 or not result.exists():
        raise ClientFailed(f"vLLM's client ended with exit code {code}: see {log.name}")
    found = json.loads(result.read_text())
    return read_samples(found), float(found["duration"])


def read_samples(found: dict[str, Any]) -> list[Sample]:
    """Each request of a detailed result."""
    return [
        Sample(0.0, failure=error[-200:])
        if error
        else Sample(0.0, tuple(itertools.accumulate(gaps, initial=ttft)))
        for ttft, gaps, error in zip(found["ttfts"], found["itls"], found["errors"], strict=True)
    ]
