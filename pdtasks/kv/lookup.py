"""Which blocks does a request write or read? (vLLM's scheduler side)

Runs in the engine core's scheduling loop: it does no I/O.  A request says what it wants in
`kv_transfer_params` (`pdtasks.kv.params`).
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from pdtasks.kv import params
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan
from pdtasks.kv.resume import advance_grammar, carry_over

logger = init_logger(__name__)


class _Saving:
    """A prompt on its way out."""

    def __init__(self, request: Request, transfer_id: str) -> None:
        self.request = request
        self.transfer_id = transfer_id
        self.num_saved = 0  # blocks already planned


class BlockLookup:
    """Decides what is saved and loaded, and plans it step by step."""

    def __init__(self, *, fingerprint: str, block_size: int, tp_size: int, ttl_s: int) -> None:
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._tp_size = tp_size
        self._ttl_s = ttl_s
        self._saving: dict[str, _Saving] = {}
        self._handles: dict[str, KVHandle] = {}  # still to be loaded
        self._loads: list[BlockLoad] = []  # for the next step
        self._held: set[str] = set()  # finished since the last step, save still under way

    def on_new_request(self, request: Request) -> None:
        """Take note of what `request` wants."""
        wants = params.ours(request.kv_transfer_params)
        carry_over(request)
        if transfer_id := wants.get("save"):
            self._saving[request.request_id] = _Saving(request, transfer_id)
        if wire := wants.get("load"):
            try:
                handle = KVHandle.from_wire(wire)
            except msgspec.ValidationError:
                logger.warning("unreadable KV handle of %s: recomputing", request.request_id)
                return
            if self._readable(handle, request):
                self._handles[request.request_id] = handle

    def _readable(self, handle: KVHandle, request: Request) -> bool:
        if handle.fingerprint != self._fingerprint:
            logger.warning(
                "KV of %s was written by an engine with another model, layout or version "
                "(fingerprint %s, here %s): recomputing",
                request.request_id,
                handle.fingerprint,
                self._fingerprint,
            )
            return False
        return handle.expires_at > time.time() and handle.num_tokens <= request.num_prompt_tokens

    def num_loadable_tokens(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens that the store can supply beyond those computed here; plans nothing."""
        advance_grammar(request)
        handle = self._handles.get(request.request_id)
        return max(0, handle.num_tokens - num_computed_tokens) if handle else 0

    def plan_load(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> None:
        """Load `num_tokens` into the newly allocated `blocks` in the next step."""
        # Taken out at once: a request that comes here again (failed load, preemption) recomputes.
        handle = self._handles.pop(request.request_id, None)
        if handle is None or num_tokens == 0:
            return
        (all_ids,) = blocks.get_block_ids()
        (new_ids,) = blocks.get_unhashed_block_ids_all_groups()
        first = len(all_ids) - len(new_ids)  # the blocks before are local prefix hits
        self._loads.append(
            BlockLoad(
                request_id=request.request_id,
                handle=handle,
                first=first,
                block_ids=new_ids[: handle.num_blocks - first],
            )
        )

    def build_plan(self, step: SchedulerOutput) -> TransferPlan:
        """Everything that the worker side has to do with this step."""
        plan = TransferPlan(loads=self._loads, held=self._held)
        self._loads, self._held = [], set()
        for request_id, num_scheduled in step.num_scheduled_tokens.items():
            saving = self._saving.get(request_id)
            if saving is not None:
                save = self._plan_save(saving, num_scheduled, step)
                if save is not None:
                    plan.saves.append(save)
        return plan

    def _plan_save(
        self, saving: _Saving, num_scheduled: int, step: SchedulerOutput
    ) -> BlockSave | None:
        request = saving.request
        num_prompt = request.num_prompt_tokens
        num_computed = min(request.num_computed_tokens + num_scheduled, num_prompt)
        last = num_computed == num_prompt
        # The partial block leaves with the last chunk; before that it is not complete.
        num_blocks = (
            -(-num_computed // self._block_size) if last else num_computed // self._block_size
        )
        state = step.kv_connector_block_state
        assert state is not None
        all_ids = state.get_block_ids(request.request_id)
        assert all_ids is not None
        block_ids = all_ids[0][saving.num_saved : num_blocks]
        if last:
            del self._saving[request.request_id]
        if not block_ids:
            return None
        first, saving.num_saved = saving.num_saved, num_blocks
        return BlockSave(
            request_id=request.request_id,
            handle=self._handle(request, saving.transfer_id),
            first=first,
            block_ids=block_ids,
            last=last,
        )

    def _handle(self, request: Request, transfer_id: str) -> KVHandle:
        num_full = request.num_prompt_tokens // self._block_size
        return KVHandle(
            fingerprint=self._fingerprint,
            transfer_id=transfer_id,
            num_tokens=request.num_prompt_tokens,
            block_size=self._block_size,
            hashes=tuple(bytes(h) for h in request.block_hashes[:num_full]),
            tp_size=self._tp_size,
            expires_at=time.time() + self._ttl_s,
        )

    def finish(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Forget `request`.

        Returns whether its blocks must stay until the worker side reports the save as done, and
        the handle for whoever continues.
        """
        self._handles.pop(request.request_id, None)
        unfinished = self._saving.pop(request.request_id, None)
        transfer_id = params.ours(request.kv_transfer_params).get("save")
        finished = request.status in (
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_STOPPED,
        )
        if not transfer_id or unfinished is not None or not finished:
            return False, None
        self._held.add(request.request_id)
        return True, params.saved(self._handle(request, transfer_id).to_wire())
