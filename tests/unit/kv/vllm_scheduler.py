"""vLLM's scheduler around the lookup, for tests: requests, their blocks and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.core.sched.output import KVConnectorBlockState, NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from pdtasks.kv.lookup import BlockLookup
from pdtasks.kv.plan import TransferPlan

# `vllm` is part of this file's name on purpose: tests/unit/conftest.py imports vLLM early for those
# test modules that name it.

FP = "0123456789abcdef"
BLOCK = 16

init_none_hash(sha256)
hasher = get_request_block_hasher(BLOCK, sha256)


def a_request(
    num_tokens: int = 40, request_id: str = "r", salt: str | None = None, **params: Any
) -> Request:
    """A request of vLLM's, with what it wants of us in `params`."""
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(
            max_tokens=5, extra_args={"kv_transfer_params": {"pdtasks": params} if params else None}
        ),
        pooling_params=None,
        block_hasher=hasher,
        cache_salt=salt,
    )


def blocks_of(ids: list[int], num_cached: int = 0) -> KVCacheBlocks:
    """Blocks that vLLM has given a request, the first ones out of its own prefix cache."""
    blocks = [KVCacheBlock(block_id=i) for i in ids]
    for block in blocks[:num_cached]:
        block.set_block_hash(make_block_hash_with_group_id(a_request().block_hashes[0], 0))
    return KVCacheBlocks((blocks,))


class FakeProbe:
    """A store that has what a test says of it."""

    def __init__(self) -> None:
        self.asked: dict[str, list[list[str]]] = {}  #: request -> names of its blocks
        self.found: int | None = 0  #: what the next answer is
        self.forgotten: list[str] = []
        self.closed = False
        self._open: set[str] = set()

    def start(self, request_id: str, blocks: Sequence[Sequence[str]]) -> None:
        assert request_id not in self.asked, "one question for each request"
        self.asked[request_id] = [list(names) for names in blocks]
        self._open.add(request_id)

    def take(self, request_id: str) -> int | None:
        if request_id not in self._open:
            return 0
        if self.found is not None:
            self._open.remove(request_id)
        return self.found

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)
        self._open.discard(request_id)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self.closed = True


class FakeScheduler:
    """What vLLM's scheduler does around the connector, for requests that do nothing else."""

    def __init__(self, lookup: BlockLookup) -> None:
        self.lookup = lookup
        self.tables: dict[str, list[int]] = {}
        self._known: set[str] = set()  # to the workers
        self._more: dict[str, list[int]] = {}  # blocks that were given since the last step

    def add(self, request: Request, block_ids: list[int]) -> None:
        self.lookup.on_new_request(request)
        self.tables[request.request_id] = block_ids

    def preempt(self, request: Request, block_ids: list[int]) -> set[str]:
        """`request` loses its blocks, and gets others later; returns what the next step says."""
        request.num_computed_tokens = 0
        self.tables[request.request_id] = block_ids
        self._more[request.request_id] = block_ids
        return {request.request_id}

    def grow(self, request: Request, block_ids: list[int]) -> None:
        """`request` gets these blocks more."""
        self.tables[request.request_id] = [*self.tables[request.request_id], *block_ids]
        self._more[request.request_id] = block_ids

    def step(
        self, scheduled: dict[Request, int] | None = None, preempted: set[str] | None = None
    ) -> TransferPlan:
        scheduled = scheduled or {}
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = {r.request_id: n for r, n in scheduled.items()}
        output.preempted_req_ids = preempted
        for request in scheduled:
            self._tell_blocks(output, request)
        output.kv_connector_block_state = KVConnectorBlockState(
            req_ids=set(output.num_scheduled_tokens),
            resolve_block_ids=lambda request_id: (self.tables[request_id],),
            boundary_state_offloads={},
        )
        plan = self.lookup.build_plan(output)
        for request, num_tokens in scheduled.items():
            request.num_computed_tokens += num_tokens
        return plan

    def _tell_blocks(self, output: SchedulerOutput, request: Request) -> None:
        name, known = request.request_id, output.scheduled_cached_reqs
        if name not in self._known:
            self._known.add(name)
            output.scheduled_new_reqs.append(
                NewRequestData.from_request(request, (self.tables[name],))
            )
            return
        known.req_ids.append(name)
        more = self._more.pop(name, [])
        known.new_block_ids.append((more,) if more else None)


def saves_of(*plans: TransferPlan) -> list[list[tuple[int, list[int], bool]]]:
    """What each plan saves: first block, block ids, whether it is the last save."""
    return [[(s.first, s.block_ids, s.last) for s in plan.saves] for plan in plans]


def a_lookup(probe: FakeProbe, **options: Any) -> BlockLookup:
    """A lookup with small limits, unless `options` say otherwise."""
    values: dict[str, Any] = {
        "fingerprint": FP,
        "block_size": BLOCK,
        "tp_size": 1,
        "ttl_s": 60,
        "probe": probe,
        "min_prefix_tokens": 2 * BLOCK,
        "vocabulary": 1000,
        "max_tokens": 1000,
    }
    return BlockLookup(**values | options)
