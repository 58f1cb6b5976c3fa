"""Are the times that vLLM's client wrote down read as ours are?"""

from __future__ import annotations

from pathlib import Path

import pytest

from pdtasks.bench.serving.plan import Workload
from pdtasks.bench.serving.vllm_client import ClientFailed, read_samples, run_vllm_client


def test_first_token_and_gaps_are_told_apart() -> None:
    first, second = read_samples(
        {"ttfts": [0.5, 0.0], "itls": [[0.1, 0.02], []], "errors": ["", "HTTP 500"]}
    )

    assert [first.ttft, first.e2e] == pytest.approx([0.5, 0.62])
    assert first.gaps == pytest.approx([0.1, 0.02])
    assert second.failure == "HTTP 500"


def test_a_client_that_fails_names_its_log(tmp_path: Path) -> None:
    workload = Workload(prompt=5, answer=2, rates=[0], requests=1)

    with pytest.raises(ClientFailed, match=r"within 0 s: see .*client\.log"):
        run_vllm_client(
            "http://127.0.0.1:1", "m", "nowhere", workload, 0, seed=1, folder=tmp_path, limit_s=0.1
        )
