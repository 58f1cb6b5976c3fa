"""KV that is lost or foreign costs time, never the answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest

from pdtasks.kv.ring import RingReader, ring_names
from tests.acceptance.nursery import Nursery
from tests.acceptance.running_stack import Stack, answers_by, ask
from tests.waiting import wait_until

#: A recomputed prompt differs in its last bits from one that was handed over (other shapes in the
#: kernels, other processors): its answer has to be one that hangs on none.
SURE = "Now, what is the capital of France?"


def lose_rings(stack: Stack) -> None:
    """No block of any ring of the stack is there any more."""
    names = ring_names() & _files_of(stack)
    assert names
    for name in names:
        reader = RingReader(name)
        for slot in range(reader.num_slots):
            reader._words[slot * 8] = 1 << 62
        reader.close()


def _files_of(stack: Stack) -> set[str]:
    """Names of what the prefill workers' processes have mapped."""
    workers = [psutil.Process(pid) for pid in stack.worker_pids("prefill")]
    processes = workers + [child for w in workers for child in w.children(recursive=True)]
    return {Path(mapped.path).name for p in processes for mapped in p.memory_maps()}


@pytest.mark.parametrize("lost", ["store", "ring"])
def test_either_of_ring_and_store_is_enough(stack: Stack, client: httpx.Client, lost: str) -> None:
    prompt = f"{lost}. Tell me about the sun. " * 20
    before = set(stack.kv.scan_iter())

    def both_have_it() -> bool:
        new = set(stack.kv.scan_iter()) - before
        return any(key.startswith(b"pd:kv:tail:") for key in new) and len(new) > 1

    with ThreadPoolExecutor(1) as background:
        with stack.paused("decode"):
            answer = background.submit(ask, client, prompt, f"either-{lost}", max_tokens=16)
            wait_until(both_have_it)
            if lost == "store":
                stack.kv.flushall()
            else:
                lose_rings(stack)
        stages = answer.result(timeout=60)["stages"]

    assert stages["prefill"]["kv_blocks_written"] > 1
    assert stages["decode"]["kv_blocks_loaded"] == stages["prefill"]["kv_blocks_written"]
    assert stages["decode"]["kv_blocks_recomputed"] == 0


def test_flushed_kv_gives_the_same_answer_by_recompute(stack: Stack, client: httpx.Client) -> None:
    prompt = "Tell me about the moon. " * 20 + SURE
    whole = ask(client, "A. " + prompt, "flush-0", max_tokens=8)
    assert whole["stages"]["decode"]["kv_blocks_recomputed"] == 0

    before = set(stack.kv.scan_iter())

    # When the KV disappears between the stages
    with ThreadPoolExecutor(1) as background:
        with stack.paused("decode"):
            answer = background.submit(ask, client, "B. " + prompt, "flush-1", max_tokens=8)

            def prefill_has_written_every_block() -> bool:
                new = set(stack.kv.scan_iter()) - before
                return bool(len(new) >= whole["stages"]["prefill"]["kv_blocks_written"])

            wait_until(prefill_has_written_every_block)
            stack.kv.flushall()
            lose_rings(stack)
        lost = answer.result(timeout=60)

    # Then decode computed the prompt again, said so, and the answer is that of a whole hand-over
    written = lost["stages"]["prefill"]["kv_blocks_written"]
    assert written > 1
    assert lost["stages"]["decode"]["kv_blocks_loaded"] == 0
    assert lost["stages"]["decode"]["kv_blocks_recomputed"] == written
    again = ask(client, "B. " + prompt, "flush-2", max_tokens=8)
    assert lost["choices"][0]["message"] == again["choices"][0]["message"]


def test_a_block_damaged_in_the_store_is_recomputed(stack: Stack, client: httpx.Client) -> None:
    prompt = "D. Tell me about the tides. " * 24 + SURE
    before = set(stack.kv.scan_iter())

    # When bytes flip in the live server between the stages
    with ThreadPoolExecutor(1) as background:
        with stack.paused("decode"):
            answer = background.submit(ask, client, prompt, "flip-0", max_tokens=8)

            def the_whole_prompt_is_written() -> bool:
                new = set(stack.kv.scan_iter()) - before
                return any(key.startswith(b"pd:kv:tail:") for key in new) and len(new) > 1

            wait_until(the_whole_prompt_is_written)
            for key in set(stack.kv.scan_iter()) - before:
                value = bytearray(cast("bytes", stack.kv.get(key)))
                value[len(value) // 2] ^= 0x10
                stack.kv.set(key, bytes(value), keepttl=True)
            lose_rings(stack)
        damaged = answer.result(timeout=60)

    # Then the prompt was recomputed and the damaged blocks are gone, so the next one is whole again
    assert damaged["stages"]["decode"]["kv_blocks_loaded"] == 0
    assert damaged["stages"]["decode"]["kv_blocks_recomputed"] > 1
    again = ask(client, prompt, "flip-1", max_tokens=8)
    assert again["choices"][0]["message"] == damaged["choices"][0]["message"]


def test_a_decode_worker_of_another_fingerprint_recomputes(
    stack: Stack, client: httpx.Client, nursery: Nursery, tmp_path: Path
) -> None:
    prompt = "C. Name three rivers. " * 12 + SURE
    expected = ask(client, prompt, "foreign-0", max_tokens=8)

    # Given a decode worker, started by hand, whose blocks have another size.  (That other weights
    # under the same name make another fingerprint: unit/kv/test_identity.py.)
    changes = {"PDTASKS_ENGINE_ARGS": '{"block_size": 32}'}
    with stack.joined_by("decode", tmp_path, changes, nursery) as pid:
        # When it takes a job
        foreign = answers_by(
            stack,
            "decode",
            pid,
            lambda n: ask(client, prompt, f"foreign-{n}", max_tokens=8),
        )

    # Then it has recomputed the prompt, and the answer is the same
    for body in foreign:
        assert body["choices"][0]["message"] == expected["choices"][0]["message"]
        assert body["stages"]["decode"]["kv_blocks_loaded"] == 0
        assert body["stages"]["decode"]["kv_blocks_recomputed"] > 0
