"""Does the stub engine repeat itself, and go on where another one stopped?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from pdtasks.bench.chaos import stub
from pdtasks.bench.chaos.stub import StubCore, kv_of, token_of
from pdtasks.kv import params
from pdtasks.settings import make_settings

PROMPT = [1, 2, 3]
#: Nobody listens there: KV is recomputed.
NO_STORE = make_settings(kv_urls=("valkey://127.0.0.1:1/0",), kv_timeout_s=1)


@pytest.fixture(autouse=True)
def quick_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub, "STEP_S", 0.0)


def request(name: str, transfer: dict[str, Any], **sampling: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(PROMPT),
        mm_features=None,
        sampling_params=SamplingParams(
            **{"max_tokens": 6, "temperature": 0.0, **sampling},
            extra_args={"kv_transfer_params": transfer},
        ),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def run(*requests: EngineCoreRequest) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """What a core makes of `requests`: tokens by name, and records of transfers."""

    async def steps() -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
        core = StubCore(NO_STORE)
        made: dict[str, list[int]] = {r.request_id: [] for r in requests}
        records: list[dict[str, Any]] = []
        left = set(made)
        for one in requests:
            await core.add_request_async(one)
        async with asyncio.timeout(20):
            while left or len(records) < len(requests):
                step = await core.get_output_async()
                for output in step.outputs:
                    made[output.request_id] += output.new_token_ids
                    left -= {output.request_id} if output.finish_reason is not None else set()
                if step.scheduler_stats is not None:
                    stats: Any = step.scheduler_stats
                    records += stats.kv_connector_stats["records"]
        core.shutdown()
        return made, records

    return asyncio.run(steps())


def load(tokens: list[int]) -> dict[str, Any]:
    return params.load(stub._handle("t", len(PROMPT)), tokens)


def test_the_same_request_gives_the_same_tokens_and_another_seed_others() -> None:
    seeded = {"temperature": 1.0, "seed": 5}
    made, _ = run(
        request("a", load([])),
        request("b", load([])),
        request("c", load([]), **seeded),
        request("d", load([]), **seeded),
        request("e", load([]), **seeded | {"seed": 6}),
    )

    assert made["a"] == made["b"]
    assert made["c"] == made["d"]
    assert len({tuple(made[name]) for name in "ace"}) == 3
    assert len(made["a"]) == 6


def test_a_request_goes_on_behind_the_tokens_that_are_there() -> None:
    made, _ = run(request("whole", load([])), request("rest", load([7, 7])))

    assert made["rest"] == made["whole"][2:]


def test_a_store_that_is_away_is_told_and_costs_no_answer() -> None:
    made, records = run(
        request("first", params.save("t"), max_tokens=1), request("rest", load([7]))
    )

    assert {(r["op"], bool(r["error"]), r["missing"]) for r in records} == {
        ("save", True, 0),
        ("load", False, 1),
    }
    assert made["first"] == [token_of(kv_of(PROMPT), None, 0)]
    assert len(made["rest"]) == 5


def test_kv_of_another_prompt_makes_another_answer() -> None:
    own, other = kv_of([1, 2, 3]), kv_of([1, 2, 4])

    assert [token_of(own, None, n) for n in range(8)] != [
        token_of(other, None, n) for n in range(8)
    ]
