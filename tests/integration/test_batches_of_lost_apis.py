"""A batch whose API process is killed: each line has one outcome. Real processes, stub engines."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import openai

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import STUB_MODEL, ChaosStack
from pdtasks.cluster.console import Console
from tests.waiting import wait_until

COUNT = 60


def test_a_batch_outlives_the_api_process_that_took_it(
    tmp_path: Path, bench_nursery: Nursery
) -> None:
    body = {"model": STUB_MODEL, "prompt": "hello", "max_tokens": 12, "temperature": 0}
    lines = [
        {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": body}
        for n in range(COUNT)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    console = Console(io.StringIO())
    with (
        ChaosStack(
            tmp_path, "stub", console, deadline_s=60, nursery=bench_nursery, batch_concurrency=4
        ) as stack,
        openai.OpenAI(base_url=f"{stack.apis[0].where}/v1", api_key="none") as first,
        openai.OpenAI(base_url=f"{stack.apis[1].where}/v1", api_key="none") as second,
    ):
        file = first.files.create(file=("in.jsonl", content), purpose="batch")
        made = first.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )

        def completed() -> int:
            counts = second.batches.retrieve(made.id).request_counts
            return counts.completed if counts else 0

        # Given a batch that both processes run
        wait_until(lambda: completed() >= 8)

        # When the one that took it is killed
        os.kill(stack.apis[0].process.pid, signal.SIGKILL)

        # Then the other one ends it
        wait_until(lambda: second.batches.retrieve(made.id).status == "completed", 60)
        batch = second.batches.retrieve(made.id)
        assert batch.output_file_id is not None
        assert batch.error_file_id is None
        found = second.files.content(batch.output_file_id).text.splitlines()
        outcomes = [json.loads(line) for line in found]
        assert sorted(o["custom_id"] for o in outcomes) == sorted(f"id-{n}" for n in range(COUNT))
        texts = {o["response"]["body"]["choices"][0]["text"] for o in outcomes}
        assert len(texts) == 1
        assert batch.request_counts is not None
        assert batch.request_counts.completed == COUNT
