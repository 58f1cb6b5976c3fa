"""One request in the engine, from its start to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason


@dataclass(eq=False)
class Generation:
    """One request in the engine. Touched only on the engine's loop."""

    request: EngineCoreRequest  #: its `request_id` is the engine's own name of it
    request_id: str  #: as the asker knows it
    reply_to: str | None  #: reply stream, or None when nobody reads along
    position: int  #: tokens of the answer that were made before
    on_output: Callable[[Generation, EngineCoreOutput], None]  #: may move or hide the finish
    token_ids: list[int] = field(default_factory=list)  #: made here
    finish_reason: FinishReason | None = None  #: why this generation ended
    stop_reason: int | str | None = None
    entered_engine: bool = False
    left_engine: bool = False  #: the engine core has ended it by itself
    transfer_params: dict[str, Any] | None = None  #: vLLM's `kv_transfer_params` at the end
    cached_tokens: int = 0  #: prompt tokens in this engine's own prefix cache
    finished: asyncio.Future[None] = field(default_factory=asyncio.Future)
    transfers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  #: records by op
    saved: asyncio.Event = field(default_factory=asyncio.Event)  #: all ranks have saved, or failed

    def take(self, output: EngineCoreOutput) -> int:
        """Note `output`; returns the position of its first token in the whole answer."""
        position = self.position + len(self.token_ids)
        self.token_ids.extend(output.new_token_ids)
        if output.prefill_stats is not None:
            self.cached_tokens = output.prefill_stats.num_local_cached_tokens
        if output.finish_reason is not None:
            self.left_engine = True
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
            self.transfer_params, output.kv_transfer_params = output.kv_transfer_params, None
        self.on_output(self, output)
        return position

    def end(self, error: Exception | None = None) -> None:
        """Wake who waits for `finished`."""
        if not self.finished.done():
            if error is None:
                self.finished.set_result(None)
            else:
                self.finished.set_exception(error)
