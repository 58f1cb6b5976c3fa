"""One request in the engine, from its start to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from pdtasks.naming import DECODE


class State(Enum):
    """How far a generation has come."""

    NEW = auto()  #: the engine core has not been told of it
    RUNNING = auto()
    ANSWERED = auto()  #: the engine core has ended it by itself
    STOPPED = auto()  #: its text is complete; the engine core would go on
    FAILED = auto()


#: What may follow on what; anything else is a fault of ours.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.RUNNING}),
    State.RUNNING: frozenset({State.ANSWERED, State.STOPPED, State.FAILED}),
    # Until whoever waits has been woken, what cannot be told fails all the same.
    State.ANSWERED: frozenset({State.FAILED}),
    State.STOPPED: frozenset({State.FAILED}),
    State.FAILED: frozenset(),
}


class Verdict(NamedTuple):
    """What a stage says of an output."""

    stopped_at: str | None = None  #: the stop string that the text has reached
    hides_end: bool = False  #: the end of this generation is not the end of the answer


#: Called once for each output, before it is told to anybody.
Judge = Callable[[EngineCoreOutput], Verdict]


@dataclass(eq=False)
class Generation:
    """One request in the engine. Touched only on the engine's loop."""

    request: EngineCoreRequest  #: its `request_id` is the engine's own name of it
    request_id: str  #: as the asker knows it
    reply_to: str | None  #: reply stream, or None when nobody reads along
    position: int  #: tokens of the answer that were made before
    stage: str = DECODE  #: whose part of the answer it makes
    attempt: int = 0  #: tells attempts at one request apart, in all processes
    judge: Judge = lambda _: Verdict()
    state: State = State.NEW
    token_ids: list[int] = field(default_factory=list)  #: made here
    finish_reason: FinishReason | None = None  #: why this generation ended
    stop_reason: int | str | None = None
    transfer_params: dict[str, Any] | None = None  #: vLLM's `kv_transfer_params` at the end
    cached_tokens: int = 0  #: prompt tokens in this engine's own prefix cache
    finished: asyncio.Future[None] = field(default_factory=asyncio.Future)
    transfers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  #: records by op
    moved_at: dict[str, float] = field(default_factory=dict)  #: UNIX seconds of the last, by op
    saved: asyncio.Event = field(default_factory=asyncio.Event)  #: all ranks have saved, or failed

    def begin(self) -> None:
        """The engine core is told of it now."""
        self._enter(State.RUNNING)

    def take(self, output: EngineCoreOutput) -> int:
        """Note `output`, and hide its end where `judge` says so.

        Returns the position of its first token in the whole answer.
        """
        position = self.position + len(self.token_ids)
        self.token_ids.extend(output.new_token_ids)
        if output.prefill_stats is not None:
            self.cached_tokens = output.prefill_stats.num_local_cached_tokens
        if output.finish_reason is not None:
            self._enter(State.ANSWERED)
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
            self.transfer_params, output.kv_transfer_params = output.kv_transfer_params, None
        verdict = self.judge(output)
        if verdict.stopped_at is not None:
            if self.state is State.RUNNING:
                self._enter(State.STOPPED)
            self.finish_reason, self.stop_reason = FinishReason.STOP, verdict.stopped_at
        if verdict.hides_end:
            output.finish_reason = None
        return position

    @property
    def is_over(self) -> bool:
        """Has its end been told to who waits for `finished`?"""
        return self.finished.done()

    def end(self) -> None:
        """Wake who waits for `finished`."""
        if not self.is_over:
            self.finished.set_result(None)

    def fail(self, error: Exception) -> None:
        """Let `error` be raised where `finished` is waited for; nothing when it has ended."""
        if not self.is_over:
            self._enter(State.FAILED)
            self.finished.set_exception(error)

    def _enter(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"{self.request_id} is {self.state.name}, not to be {state.name}")
        self.state = state
