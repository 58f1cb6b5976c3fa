"""KV that is lost or foreign costs time, never the answer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from pdtasks.models import resolve_model
from pdtasks.settings import load_settings
from tests.acceptance.running_stack import MODEL, Stack, ask, wait_until

#: A token that no text of these tests contains.
_UNUSED_TOKEN = 3


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


@pytest.mark.parametrize("difference", ["layout", "model"])
def test_a_decode_worker_of_another_fingerprint_recomputes(
    difference: str, stack: Stack, client: httpx.Client, tmp_path: Path
) -> None:
    prompt = f"C {difference}. Name three rivers. " * 12
    expected = ask(client, prompt, f"{difference}-0", max_tokens=12)

    # Given a decode worker, started by hand, whose blocks have another size, or whose model, under
    # the same name, is another one
    if difference == "layout":
        changes = {"PDTASKS_ENGINE_ARGS": '{"block_size": 32}'}
    else:
        changes = {"PDTASKS_MODEL": str(_fine_tune(tmp_path)), "PDTASKS_SERVED_MODEL_NAME": MODEL}
    with _decode_worker(stack, changes, tmp_path) as pid:
        others = [other for other in stack.worker_pids("decode") if other != pid]

        # When only it takes jobs
        for other in others:
            os.kill(other, signal.SIGSTOP)
        try:
            # The broker may still hand a job to the stopped worker, which keeps it until it wakes.
            with ThreadPoolExecutor(2) as background:
                answers = [
                    background.submit(ask, client, prompt, f"{difference}-{n}", max_tokens=12)
                    for n in (1, 2)
                ]

                def one_is_answered() -> bool:
                    return any(a.done() for a in answers)

                wait_until(one_is_answered, 60)
                for other in others:
                    os.kill(other, signal.SIGCONT)
                done = [a.result(timeout=60) for a in answers]
        finally:
            for other in others:
                os.kill(other, signal.SIGCONT)

    # Then it has recomputed the prompt, and the answer is the same
    foreign = [d for d in done if d["stages"]["decode"]["worker"].startswith("other@")]
    assert foreign
    for body in foreign:
        assert body["choices"][0]["message"] == expected["choices"][0]["message"]
        assert body["stages"]["decode"]["kv_blocks_loaded"] == 0
        assert body["stages"]["decode"]["kv_blocks_recomputed"] > 0


def _fine_tune(folder: Path) -> Path:
    """The embedded model with one weight of an unused token changed: the same answers."""
    settings = load_settings()
    original = Path(resolve_model(None, settings.cache_dir, lambda _: None))
    changed = shutil.copytree(original, folder / "fine-tune")
    (weights,) = changed.glob("*.safetensors")
    tensors = load_file(weights)
    embedding = next(t for name, t in tensors.items() if "embed_tokens" in name)
    embedding[_UNUSED_TOKEN] += 0.001
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == next(original.glob("*.safetensors")).stat().st_size
    return changed


@contextmanager
def _decode_worker(stack: Stack, changes: dict[str, str], folder: Path) -> Iterator[int]:
    """A decode worker that joins the stack under the name other@…; yields its pid."""
    log = (folder / "worker.log").open("w")
    celery = [sys.executable, "-m", "celery", "-A", "pdtasks", "worker"]
    worker = subprocess.Popen(
        [*celery, "-Q", "decode", "-P", "threads", "-c", "2", "-n", "other@%h"],
        env=stack.env | changes | {"VLLM_CPU_OMP_THREADS_BIND": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
        start_new_session=True,
    )
    try:

        def it_has_joined() -> bool:
            assert worker.poll() is None, (folder / "worker.log").read_text()[-3000:]
            workers = stack.status()["workers"]
            return any(w["pid"] == worker.pid and w["state"] == "ready" for w in workers)

        wait_until(it_has_joined, 120)
        yield worker.pid
    finally:
        worker.terminate()
        worker.wait(timeout=60)
        log.close()
