"""What of a worker's outputs is new to a request's answer?

A stage whose worker died is run again by another and repeats what is there; of two that run at once
one counts (`api.attempts`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from api.attempts import Attempts
from pdtasks.errors import IncompatibleWorker, WorkerLost
from pdtasks.messages import Ask
from pdtasks.naming import STAGES


class Answer:
    """A request's tokens so far, and who may add to them."""

    def __init__(self, vocabulary: int) -> None:
        """`vocabulary`: token ids are below this."""
        self.token_ids: list[int] = []
        self._vocabulary = vocabulary
        self._attempts = Attempts()

    def takes_over(self, ask: Ask) -> bool:
        """See `Attempts.takes_over`."""
        return self._attempts.takes_over(ask)

    def ended_by(self, stage: str, attempt: int) -> bool:
        """See `Attempts.ended_by`."""
        return self._attempts.ended_by(stage, attempt)

    def take(self, position: int, output: EngineCoreOutput, *, stage: str, attempt: int) -> bool:
        """Add `output`, and leave in it what is new; False when nothing is, or it does not count.

        Args:
            position: tokens of the answer before its first.
            stage, attempt: whose it is.

        Raises IncompatibleWorker for tokens that the model does not have, WorkerLost when they are
        others than those that are there.
        """
        new = output.new_token_ids
        if new and not 0 <= min(new) <= max(new) < self._vocabulary:
            raise IncompatibleWorker("tokens that the model does not have")
        fits = self._fits(position, new)
        if stage == STAGES[-1] and not self._attempts.counts(attempt, fits=fits):
            return False
        if not fits:
            raise WorkerLost("a worker was lost and its successor's answer differs: ask again")
        if num_repeated := len(self.token_ids[position : position + len(new)]):
            if num_repeated == len(new) and output.finish_reason is None:
                return False
            output.new_token_ids = new[num_repeated:]
            if output.new_logprobs is not None:
                output.new_logprobs = output.new_logprobs.slice_request(
                    num_repeated, len(output.new_token_ids)
                )
        self.token_ids.extend(output.new_token_ids)
        return True

    def _fits(self, position: int, new: Sequence[int]) -> bool:
        """Do `new` tokens repeat those that are there, or follow on them?"""
        repeated = self.token_ids[position : position + len(new)]
        return position <= len(self.token_ids) and repeated == new[: len(repeated)]


def leave_what_can_be(
    request: EngineCoreRequest, output: EngineCoreOutput, *, shift: float
) -> None:
    """Take from `output` what is none of a text's, and figures that cannot be.

    vLLM's front half adds them up over all requests. `shift`: to be added to its times.
    """
    output.pooling_output = output.kv_transfer_params = output.ec_transfer_params = None
    output.mm_cache_miss_hashes = output.trace_headers = None
    stats, num_prompt = output.prefill_stats, len(request.prompt_token_ids or ())
    if stats is not None and not all(0 <= count <= num_prompt for count in astuple(stats)):
        output.prefill_stats = None
    for event in output.events or ():
        event.timestamp += shift
        if not math.isfinite(event.timestamp):
            output.events = None
