"""KV that is lost or foreign costs time, never the answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.acceptance.running_stack import Stack, ask, wait_until


def test_flushed_kv_gives_the_same_answer_by_recompute(stack: Stack, client: httpx.Client) -> None:
    prompt = "Tell me about the moon. " * 20
    whole = ask(client, "A. " + prompt, "flush-0", max_tokens=16)
    assert whole["stages"]["decode"]["kv_blocks_recomputed"] == 0

    before = set(stack.kv.scan_iter())

    # When the KV disappears between the stages
    with ThreadPoolExecutor(1) as background:
        with stack.paused("decode"):
            answer = background.submit(ask, client, "B. " + prompt, "flush-1", max_tokens=16)

            def prefill_has_written_every_block() -> bool:
                new = set(stack.kv.scan_iter()) - before
                return bool(len(new) == whole["stages"]["prefill"]["kv_blocks_written"])

            wait_until(prefill_has_written_every_block)
            stack.kv.flushall()
        lost = answer.result(timeout=60)

    # Then decode computed the prompt again, said so, and the answer is that of a whole hand-over
    written = lost["stages"]["prefill"]["kv_blocks_written"]
    assert written > 1
    assert lost["stages"]["decode"]["kv_blocks_loaded"] == 0
    assert lost["stages"]["decode"]["kv_blocks_recomputed"] == written
    again = ask(client, "B. " + prompt, "flush-2", max_tokens=16)
    assert lost["choices"][0]["message"] == again["choices"][0]["message"]


def test_a_decode_worker_with_another_layout_recomputes(
    stack: Stack, client: httpx.Client, tmp_path: Path
) -> None:
    prompt = "C. Name three rivers. " * 12
    expected = ask(client, prompt, "layout-0", max_tokens=12)

    # Given a decode worker, started by hand, whose blocks have another size
    log = (tmp_path / "worker.log").open("w")
    env = stack.env | {
        "PDTASKS_ENGINE_ARGS": '{"block_size": 32}',
        "VLLM_CPU_OMP_THREADS_BIND": "1",
    }
    celery = [sys.executable, "-m", "celery", "-A", "pdtasks", "worker"]
    worker = subprocess.Popen(
        [*celery, "-Q", "decode", "-P", "threads", "-c", "2", "-n", "other@%h"],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:

        def it_has_joined() -> bool:
            assert worker.poll() is None, (tmp_path / "worker.log").read_text()[-3000:]
            workers = stack.status()["workers"]
            return any(w["pid"] == worker.pid and w["state"] == "ready" for w in workers)

        wait_until(it_has_joined, 120)
        others = [pid for pid in stack.worker_pids("decode") if pid != worker.pid]

        # When only it takes jobs
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            # The broker may still hand a job to the stopped worker, which keeps it until it wakes.
            with ThreadPoolExecutor(2) as background:
                answers = [
                    background.submit(ask, client, prompt, f"layout-{n}", max_tokens=12)
                    for n in (1, 2)
                ]

                def one_is_answered() -> bool:
                    return any(a.done() for a in answers)

                wait_until(one_is_answered, 60)
                for pid in others:
                    os.kill(pid, signal.SIGCONT)
                done = [a.result(timeout=60) for a in answers]
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)

        # Then it has recomputed the prompt, and the answer is the same
        foreign = [d for d in done if d["stages"]["decode"]["worker"].startswith("other@")]
        assert foreign
        for body in foreign:
            assert body["choices"][0]["message"] == expected["choices"][0]["message"]
            assert body["stages"]["decode"]["kv_blocks_loaded"] == 0
            assert body["stages"]["decode"]["kv_blocks_recomputed"] > 0
    finally:
        worker.terminate()
        worker.wait(timeout=60)
        log.close()
