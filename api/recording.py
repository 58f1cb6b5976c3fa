"""How does one run of a request give both a stream and a whole answer?

vLLM formats an answer either as chunks or as one body.  A job needs both: chunks to read along,
and the body as its result.  So its outputs are recorded while the chunks are made (`Tape`), and
played to vLLM's formatter of whole answers afterwards: neither computed twice nor formatted by us.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from api.client import PipelineLLM


class Tape:
    """The outputs of one API request, by the engine request's id."""

    def __init__(self) -> None:
        self.is_full = False
        self._outputs: dict[str, RequestOutput] = {}

    async def record(
        self, request_id: str, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Pass `outputs` (deltas) on and keep them."""
        async for output in outputs:
            self._keep(request_id, output)
            yield output

    def _keep(self, request_id: str, delta: RequestOutput) -> None:
        own = copy.copy(delta)  # whoever reads the delta may still do so while ours grows
        own.outputs = [copy.copy(completion) for completion in delta.outputs]
        for completion in own.outputs:
            completion.token_ids = list(completion.token_ids)
            if completion.logprobs is not None:
                completion.logprobs = copy.copy(completion.logprobs)
        if request_id in self._outputs:
            self._outputs[request_id].add(own, aggregate=True)
        else:
            self._outputs[request_id] = own

    async def play(self, request_id: str) -> AsyncGenerator[RequestOutput, None]:
        """The whole answer as one output."""
        whole = self._outputs[request_id]
        whole.outputs.sort(key=lambda completion: completion.index)
        yield whole


class Checked(Exception):
    """vLLM would begin with this request now: nothing is wrong with it."""


_only_checks: ContextVar[bool] = ContextVar("only_checks", default=False)
_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextmanager
def using(tape: Tape) -> Iterator[None]:
    """Record what is generated in this context; when `tape` is full, play it instead."""
    before = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(before)


@contextmanager
def only_checking() -> Iterator[None]:
    """Have what is generated in this context validated, and end with `Checked` in place of work."""
    before = _only_checks.set(True)
    try:
        yield
    finally:
        _only_checks.reset(before)


class RecordingLLM(PipelineLLM):
    """A `PipelineLLM` that obeys `using` and `only_checking`; costs others nothing for a token."""

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """What is only played or checked needs no worker."""
        tape = _tape.get()
        if not _only_checks.get() and (tape is None or not tape.is_full):
            super().check_admission(n, request_id)

    def generate(  # a plain function that returns the generator
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        if _only_checks.get():
            return self._check(prompt, sampling_params, request_id)
        tape = _tape.get()
        if tape is not None and tape.is_full:
            return tape.play(request_id)
        outputs = super().generate(prompt, sampling_params, request_id, **options)
        return outputs if tape is None else tape.record(request_id, outputs)

    async def _check(
        self, prompt: Any, params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self.require_valid(request_id, prompt, params)
        nothing: RequestOutput
        for nothing in ():  # makes it a generator
            yield nothing
        raise Checked
