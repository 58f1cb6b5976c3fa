"""What travels between the scheduler's side and the worker's side?"""

from __future__ import annotations

import pickle
from dataclasses import asdict
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from pdtasks.kv.handle import KVHandle
from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan, TransferRecord, TransferStats


def a_record(op: str = "save", blocks: int = 1, **fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "request_id": "r",
        "rank": 0,
        "world": 1,
        "bytes": 10 * blocks,
    } | fields
    return asdict(TransferRecord(op=op, blocks=blocks, **values))


def test_a_plan_reaches_the_worker_ranks_unchanged() -> None:
    handle = KVHandle(
        fingerprint="f", transfer_id="t", num_tokens=20, block_size=16, hashes=(b"h",)
    )
    step = SchedulerOutput.make_empty()
    step.kv_connector_metadata = TransferPlan(
        saves=[BlockSave(request_id="a", handle=handle, first=0, block_ids=[4, 5], last=True)],
        loads=[BlockLoad(request_id="b", handle=handle, first=1, block_ids=[6])],
        finished={"c": True, "d": False},
        preempted={"e"},
    )

    # vLLM pickles it for the ranks of a multi-process executor.
    assert pickle.loads(pickle.dumps(step)).kv_connector_metadata == step.kv_connector_metadata


def test_plans_share_nothing() -> None:
    one, other = TransferPlan(), TransferPlan()

    one.finished["a"] = True
    one.preempted.add("b")
    one.saves.clear()

    assert other == TransferPlan(saves=[], loads=[], finished={}, preempted=set())


def test_statistics_of_several_ranks_add_up() -> None:
    stats = TransferStats({"records": [a_record("save", 3)]})

    stats.aggregate(TransferStats({"records": [a_record("load", 2, missing=1)]}))
    stats.aggregate(TransferStats())

    assert stats.reduce() == {
        "save_blocks": 3,
        "save_bytes": 30,
        "save_missing": 0,
        "load_blocks": 2,
        "load_bytes": 20,
        "load_missing": 1,
    }


def test_fresh_and_reset_statistics_are_empty_and_share_nothing() -> None:
    one, other = TransferStats(), TransferStats()

    one.aggregate(TransferStats({"records": [a_record()]}))

    assert other.is_empty()
    assert not one.is_empty()
    one.reset()
    assert one.is_empty()
