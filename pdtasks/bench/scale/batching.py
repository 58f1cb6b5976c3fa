"""Which requests share an engine's next step, and how long does it take?

As vLLM's scheduler: answers under way first, a token each, then prompts in the order in which they
came, in chunks, as long as the step has room.  The same code times the stub engine of the live part
and the engines of the model; it knows nothing of clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdtasks.bench.scale.gpu import Gpu


@dataclass
class Request:
    """What an engine knows of a request."""

    key: str
    to_compute: int  #: tokens of its prompt that are not computed yet
    kv_tokens: int  #: tokens that are there: loaded, computed, made
    to_make: int  #: tokens of its answer that are still to be made here
    to_load: int = 0  #: tokens whose KV its first step copies
    saves: bool = False  #: its KV is for another engine


@dataclass(frozen=True)
class Step:
    """One step of an engine."""

    seconds: float
    prompts: Sequence[tuple[Request, int]]  #: with the tokens that are computed of each
    answers: Sequence[Request]


class Batch:
    """The requests of one engine."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._waiting: dict[str, Request] = {}  # for a place, or for their prompt's end
        self._running: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        """Have `request` share steps from the next one on."""
        self._waiting[request.key] = request

    def remove(self, key: str) -> None:
        """Forget it, also in the step that is under way."""
        self._waiting.pop(key, None)
        self._running.pop(key, None)

    def begin_step(self) -> Step | None:
        """Who shares the next step; None: nobody has anything to do."""
        for key, request in list(self._waiting.items()):
            if len(self._running) >= self._gpu.max_num_seqs:
                break
            if not request.to_compute:
                self._running[key] = self._waiting.pop(key)
        answers = list(self._running.values())
        prompts = self._prompts(self._gpu.step_tokens - len(answers))
        if not answers and not prompts:
            return None
        seconds = self._gpu.step_of(
            sum(tokens for _, tokens in prompts),
            len(answers),
            sum(r.kv_tokens for r in answers),
            sum(r.to_load for r in answers),
            saves=any(r.saves for r, _ in prompts),
        )
        for request in answers:
            request.to_load = 0
        return Step(seconds, prompts, answers)

    def end_step(self, step: Step) -> list[Request]:
        """Those that have one token more now; one that has nothing more to make is forgotten."""
        made = []
        for request, tokens in step.prompts:
            if request.key not in self._waiting:
                continue
            request.to_compute -= tokens
            request.kv_tokens += tokens
            if not request.to_compute:
                self._running[request.key] = self._waiting.pop(request.key)
                made.append(request)
        made += [r for r in step.answers if r.key in self._running]
        for request in made:
            request.to_make -= 1
            request.kv_tokens += 1
            if request.to_make <= 0:
                del self._running[request.key]
        return made

    def _prompts(self, room: int) -> list[tuple[Request, int]]:
        found = []
        places = self._gpu.max_num_seqs - len(self._running)
        for request in self._waiting.values():
            if room <= 0 or places <= 0:
                break
            if request.to_compute:
                tokens = min(room, request.to_compute)
                found.append((request, tokens))
                room -= tokens
                places -= 1
        return found
