"""Which blocks does a request write or read? (vLLM's scheduler side)

Runs in the engine core's scheduling loop: it does no I/O.  A request says what it wants in
`kv_transfer_params` (`pdtasks.kv.params`):

* `save`: the prompt's blocks are written, the partial last one too, and the handle given out;
* `load`: the blocks of a handle are read, all or nothing;
* neither, as under plain `vllm serve`: the prompt's full blocks are written for whoever comes next.

Prompts of the first and third kind begin with what the store has of them already, where that is
long enough to be worth it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import msgspec
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from pdtasks.kv import params
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.plan import BlockLoad, BlockSave, Join, TransferPlan
from pdtasks.kv.probe import PrefixProbe
from pdtasks.kv.resume import advance_grammar, carry_over
from pdtasks.kv.ring import Presence, is_there, ring_name
from pdtasks.kv.rings import Rings
from pdtasks.kv.turns import Turns

logger = init_logger(__name__)

#: Seconds for which a request waits for blocks that are said to be in a ring soon.
_RING_WAIT_S = 1.0
#: Seconds for which blocks stay in their slots that a step depends on.
KEPT_S = 2.0
#: Seconds between two looks for requests that have ended but are still kept here.
_LOOK_S = 60.0


@dataclass(eq=False)
class _Saving:
    """A prompt on its way out."""

    request: Request
    transfer_id: str | None  #: None: only full blocks, for whoever comes next
    handle: KVHandle | None = None  #: once there is something to save
    num_saved: int = 0  #: blocks already planned
    last: bool = False  #: all of them
    numbers: list[tuple[int, int]] = field(default_factory=list)  #: theirs in the ring, runs


class BlockLookup:
    """Decides what is saved and loaded, and plans it step by step."""

    def __init__(
        self,
        *,
        fingerprint: str,
        block_size: int,
        tp_size: int,
        ttl_s: int,
        probe: PrefixProbe,
        min_prefix_tokens: int,
        vocabulary: int,
        max_tokens: int,
        ring: str | None = None,
        rings: Rings | None = None,
        block_bytes: int = 0,
        short_bytes: int = 0,
        sync_bytes: int = 0,
        full_step: int | None = None,
    ) -> None:
        """Args:
        ring: the engine's id if its ranks have rings.
        rings: those of this host; None: blocks come from the store alone.
        block_bytes: of one rank.
        short_bytes: what one rank may load from rings while other requests' step waits.
        sync_bytes: the same when there are no other requests.
        full_step: see `Turns`; for prompts that are computed to be handed over.
        min_prefix_tokens: a shorter prefix is computed, not loaded, even if the store has it.
        vocabulary: number of token ids.
        max_tokens: the engine's context.
        """
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._tp_size = tp_size
        self._ttl_s = ttl_s
        self._probe = probe
        self._min_prefix_tokens = min_prefix_tokens
        self._vocabulary = vocabulary
        self._max_tokens = max_tokens
        self._saving: dict[str, _Saving] = {}
        self._handles: dict[str, KVHandle] = {}  # still to be loaded
        self._loads: list[BlockLoad] = []  # for the next step
        self._ring = ring
        self._rings = rings
        self._block_bytes = block_bytes
        self._short_bytes = short_bytes
        self._sync_bytes = sync_bytes
        self._turns = Turns(full_step)
        self._next_number = 0  # of a block in the ring
        self._waits_until: dict[str, float] = {}  # for blocks to be in a ring, monotonic
        self._joins: dict[str, Join] = {}  # of loads that are promised
        self._planned_now = 0  # bytes that the next step waits for
        self._open: set[str] = set()  # all requests that have not ended
        self._soon: dict[str, Request] = {}  # `Join.SOON`, in no step yet
        self._left: set[str] = set()  # of these, ended since the last step
        self._finished: dict[str, bool] = {}  # since the last step, with saves under way
        self._looked_at = time.monotonic()
        self._num_leaked = 0  # as told last

    def on_new_request(self, request: Request) -> None:
        """Take note of what `request` wants."""
        self._open.add(request.request_id)
        self._drop_nonsense(request)
        wants = params.ours(request.kv_transfer_params)
        carry_over(request)
        if wire := wants.get("load"):
            self._take_handle(request, wire)
        elif "load" not in wants:
            name, tokens = wants.get("save"), request.num_prompt_tokens
            # Nobody would load a prefix that is shorter; a prompt that it begins saves it as well.
            if name is not None or self._worth_it(tokens - tokens % self._block_size):
                self._saving[request.request_id] = _Saving(request, name)
            self._look_for_prefix(request)

    def _drop_nonsense(self, request: Request) -> None:
        wire = request.kv_transfer_params
        try:
            params.check(
                wire,
                num_prompt=request.num_prompt_tokens,
                vocabulary=self._vocabulary,
                max_tokens=self._max_tokens,
            )
        except ValueError as exc:
            logger.warning("kv_transfer_params of %s: %s: ignored", request.request_id, exc)
            # In place: the same object goes on to the worker side.
            assert wire is not None
            wire.clear()

    def _take_handle(self, request: Request, wire: dict[str, Any]) -> None:
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
        # A handle for other tokens would bring their KV, and one that promises more than it names
        # would leave blocks as somebody else has left them.
        ours = self._handle(request, handle.transfer_id)
        theirs = msgspec.structs.replace(
            handle, expires_at=ours.expires_at, made_at=ours.made_at, ring=None, numbers=()
        )
        if theirs != ours:
            logger.warning(
                "the KV handle of %s is not for its prompt: recomputing", request.request_id
            )
            return False
        if not self._is_numbered(handle):
            return False
        return handle.expires_at > time.time()

    def _is_numbered(self, handle: KVHandle) -> bool:
        """Could its numbers be a ring's? Under `vllm serve` a client may have written them."""
        lengths = [length for first, length in handle.numbers if first >= 0 and length > 0]
        return handle.ring is None or (
            len(lengths) == len(handle.numbers) <= handle.num_blocks == sum(lengths)
        )

    def _look_for_prefix(self, request: Request) -> None:
        # The last token is always computed: its output is the next token.
        num_blocks = (request.num_prompt_tokens - 1) // self._block_size
        if request.skip_reading_prefix_cache or not self._worth_it(num_blocks * self._block_size):
            return
        handle = self._handle(request, "", num_blocks)
        self._probe.start(request.request_id, _Names(handle))

    def _worth_it(self, num_tokens: int) -> bool:
        return num_tokens >= max(1, self._min_prefix_tokens)

    def num_loadable_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens that can be loaded beyond those computed here; plans nothing.

        None: that is not known yet.
        """
        advance_grammar(request)
        request_id = request.request_id
        handle = self._handles.get(request_id)
        if handle is not None:
            return self._num_loadable(request, handle, num_computed_tokens)
        num_blocks = self._probe.take(request_id)
        if num_blocks is None:
            return None
        num_tokens = num_blocks * self._block_size - num_computed_tokens
        if not self._worth_it(num_tokens):
            return 0 if self._has_turn(request, num_computed_tokens) else None
        self._handles[request_id] = self._handle(request, "", num_blocks)
        return num_tokens

    def _has_turn(self, request: Request, num_computed: int) -> bool:
        saving = self._saving.get(request.request_id)
        if saving is None or saving.transfer_id is None:
            return True  # the answer is made here as well: vLLM knows better
        return self._turns.take(request.num_tokens - num_computed)

    def loads_beside(self, request: Request) -> bool:
        """Do the steps go on while what `num_loadable_tokens` promised is loaded?"""
        return self._joins.get(request.request_id) is not Join.NOW

    def _num_loadable(self, request: Request, handle: KVHandle, num_computed: int) -> int | None:
        request_id = request.request_id
        num_tokens = max(0, handle.num_tokens - num_computed)
        self._joins.pop(request_id, None)
        if not num_tokens or handle.ring is None or self._rings is None:
            return num_tokens
        first = num_computed // self._block_size
        presence = self._rings.presence(handle, first)
        if presence is Presence.NOT_YET:
            now = time.monotonic()
            if now < self._waits_until.setdefault(request_id, now + _RING_WAIT_S):
                return None
        self._waits_until.pop(request_id, None)
        if presence is Presence.HERE and self._rings.keep(handle, first, KEPT_S):
            num_bytes = (handle.num_blocks - first) * self._block_bytes
            is_quick = self._rings.are_cached(handle, first)
            self._joins[request_id] = self._join(request, handle, num_bytes, is_quick=is_quick)
        return num_tokens

    def _join(self, request: Request, handle: KVHandle, num_bytes: int, *, is_quick: bool) -> Join:
        """Of a load of `num_bytes` from rings that cannot go wrong.

        A step with it costs all others the whole load's time, a later one costs the request itself
        a step or two. `is_quick`: from GPU to GPU.
        """
        is_alone = self._open == {request.request_id}
        limit = self._sync_bytes if is_alone or is_quick else self._short_bytes
        # A step has to compute something: the last token that is known.
        computes = request.num_tokens > handle.num_tokens
        return Join.NOW if computes and self._planned_now + num_bytes <= limit else Join.SOON

    def plan_load(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> None:
        """Load `num_tokens` into the newly allocated `blocks` in the next step."""
        # Taken out at once: a request that comes here again (failed load, preemption) recomputes.
        handle = self._handles.pop(request.request_id, None)
        if handle is None or num_tokens == 0:
            return
        (all_ids,) = blocks.get_block_ids()
        # The blocks before are local prefix hits.
        first = (handle.num_tokens - num_tokens) // self._block_size
        block_ids = all_ids[first : handle.num_blocks]
        join = self._joins.pop(request.request_id, Join.THERE)
        if join is Join.NOW:
            self._planned_now += len(block_ids) * self._block_bytes
        elif join is Join.SOON:
            self._soon[request.request_id] = request
        self._loads.append(
            BlockLoad(
                request_id=request.request_id,
                handle=handle,
                first=first,
                block_ids=block_ids,
                join=join,
            )
        )

    def build_plan(self, step: SchedulerOutput) -> TransferPlan:
        """Everything that the worker side has to do with this step."""
        plan = TransferPlan(
            loads=self._loads,
            finished=self._finished,
            preempted=step.preempted_req_ids or set(),
            joined=self._take_joined(),
            left=self._left,
        )
        self._loads, self._finished, self._planned_now, self._left = [], {}, 0, set()
        for request_id in plan.preempted:
            if saving := self._saving.get(request_id):
                saving.num_saved, saving.last, saving.numbers = 0, False, []
        for request_id, num_scheduled in step.num_scheduled_tokens.items():
            saving = self._saving.get(request_id)
            if saving is not None and not saving.last:
                save = self._plan_save(saving, num_scheduled, step)
                if save is not None:
                    plan.saves.append(save)
        plan.written = [*self._newly_written(step)]
        for load in plan.loads:
            plan.written += load.block_ids
        self._turns.next_step(self._num_left(step))
        self._look_for_leaks()
        return plan

    def _newly_written(self, step: SchedulerOutput) -> Iterator[int]:
        """Blocks that were given to requests of `step` for what it computes, or later ones do."""
        for new in step.scheduled_new_reqs:
            # What is computed already is another request's as well, and stays as it is.
            yield from new.block_ids[0][new.num_computed_tokens // self._block_size :]
        for block_ids in step.scheduled_cached_reqs.new_block_ids:
            if block_ids is not None:
                yield from block_ids[0]

    def _take_joined(self) -> set[str]:
        """Requests of `Join.SOON` that vLLM has taken up: it may share their blocks from now on."""
        joined = {
            request_id
            for request_id, request in self._soon.items()
            if request.status is not RequestStatus.WAITING_FOR_REMOTE_KVS
        }
        for request_id in joined:
            del self._soon[request_id]
        return joined

    def _num_left(self, step: SchedulerOutput) -> int:
        """Tokens of prompts that `step` begins, or goes on with, and does not end."""
        left = 0
        for request_id, num_scheduled in step.num_scheduled_tokens.items():
            saving = self._saving.get(request_id)
            if saving is not None and not saving.last and saving.transfer_id is not None:
                request = saving.request
                left += request.num_prompt_tokens - request.num_computed_tokens - num_scheduled
        return left

    def _look_for_leaks(self) -> None:
        """Say when requests that have ended are kept; between steps there should be none."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        leaked = sum(saving.request.is_finished() for saving in self._saving.values())
        if leaked > self._num_leaked:
            logger.warning("%d requests that have ended are still kept: please report this", leaked)
        self._num_leaked = leaked

    def leftovers(self) -> dict[str, int]:
        """How much is kept, by kind; nothing when all requests have ended and a step has passed."""
        kept = {
            "saving": len(self._saving),
            "handles": len(self._handles),
            "loads": len(self._loads),
            "finished": len(self._finished),
            "questions": self._probe.num_open,
            "waits": len(self._waits_until),
            "joins": len(self._joins),
            "open": len(self._open),
            "soon": len(self._soon),
            "left": len(self._left),
        }
        return {name: number for name, number in kept.items() if number}

    def _plan_save(
        self, saving: _Saving, num_scheduled: int, step: SchedulerOutput
    ) -> BlockSave | None:
        request = saving.request
        num_prompt = request.num_prompt_tokens
        num_computed = min(request.num_computed_tokens + num_scheduled, num_prompt)
        saving.last = num_computed == num_prompt
        # A partial block leaves with the last chunk, if it belongs to a hand-over.
        num_blocks = num_computed // self._block_size
        if saving.last and saving.transfer_id is not None:
            num_blocks = -(-num_computed // self._block_size)
        state = step.kv_connector_block_state
        assert state is not None
        all_ids = state.get_block_ids(request.request_id)
        assert all_ids is not None
        block_ids = all_ids[0][saving.num_saved : num_blocks]
        if not block_ids and not (saving.last and saving.num_saved):
            return None
        first, saving.num_saved = saving.num_saved, num_blocks
        numbered_from = None
        if self._ring is not None:
            numbered_from = self._next_number
            self._next_number += len(block_ids)
            if block_ids:
                saving.numbers.append((numbered_from, len(block_ids)))
        if saving.handle is None:
            # Once: a long prompt is saved in many chunks, and each would name all of it again.
            saving.handle = self._handle(request, saving.transfer_id or "")
        return BlockSave(
            request_id=request.request_id,
            handle=saving.handle,
            first=first,
            block_ids=block_ids,
            last=saving.last,
            numbered_from=numbered_from,
        )

    def _handle(
        self, request: Request, transfer_id: str, num_blocks: int | None = None
    ) -> KVHandle:
        """Of the whole prompt, or of its first `num_blocks` full blocks."""
        num_tokens = request.num_prompt_tokens
        if num_blocks is not None:
            num_tokens = num_blocks * self._block_size
        num_full = num_tokens // self._block_size
        hashes = tuple(bytes(h) for h in request.block_hashes[:num_full])
        return KVHandle(
            fingerprint=self._fingerprint,
            transfer_id=transfer_id,
            num_tokens=num_tokens,
            block_size=self._block_size,
            hashes=hashes,
            tail_digest=_tail_digest(request, hashes, num_full * self._block_size),
            tp_size=self._tp_size,
            expires_at=time.time() + self._ttl_s,
            made_at=time.time(),
        )

    def close(self) -> None:
        """End the probe's thread and connections."""
        self._probe.close()

    def finish(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Forget `request`.

        Returns whether its blocks must stay until the worker side reports the save as done, and
        the handle for whoever continues.
        """
        request_id = request.request_id
        self._handles.pop(request_id, None)
        self._waits_until.pop(request_id, None)
        self._joins.pop(request_id, None)
        self._open.discard(request_id)
        if self._soon.pop(request_id, None):
            self._left.add(request_id)
        self._probe.forget(request_id)
        saving = self._saving.pop(request_id, None)
        if saving is None or not saving.num_saved:
            return False, None  # of a load under way vLLM keeps the blocks by itself
        wanted = saving.last and request.status in (
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_STOPPED,
        )
        self._finished[request_id] = wanted
        if not wanted or saving.transfer_id is None:
            return True, None
        # Made anew: its times count from the end of the prompt.
        handle = self._handle(request, saving.transfer_id)
        if self._ring is not None and self._has_ring(self._ring):
            handle = msgspec.structs.replace(handle, ring=self._ring, numbers=tuple(saving.numbers))
        return True, params.saved(handle.to_wire())

    def _has_ring(self, engine_id: str) -> bool:
        """Has every rank been able to make one? Else hand-overs wait for the store."""
        return all(is_there(ring_name(engine_id, rank)) for rank in range(self._tp_size))


class _Names(Sequence[list[str]]):
    """The names of a handle's blocks, one for each rank, made when they are asked for.

    By the probe's thread: the scheduler does not wait for names that nobody may need.
    """

    def __init__(self, handle: KVHandle) -> None:
        self._handle = handle

    def __len__(self) -> int:
        return self._handle.num_blocks

    @overload
    def __getitem__(self, at: int) -> list[str]: ...
    @overload
    def __getitem__(self, at: slice) -> list[list[str]]: ...
    def __getitem__(self, at: int | slice) -> list[str] | list[list[str]]:
        if isinstance(at, slice):
            return [self[index] for index in range(len(self))[at]]
        if at >= len(self):
            raise IndexError(at)  # ends a loop over these
        return [self._handle.key(at, rank) for rank in range(self._handle.tp_size)]


def _tail_digest(request: Request, hashes: tuple[bytes, ...], begin: int) -> str:
    """Of what vLLM would hash, were the block from token `begin` to the prompt's end full."""
    end = request.num_prompt_tokens
    tail = (request.prompt_token_ids or [])[begin:end]
    extra, _ = generate_block_hash_extra_keys(request, begin, end, 0)
    content = (hashes[-1:], tail, extra, request.cache_salt)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:32]
