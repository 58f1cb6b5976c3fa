"""What does a client do with an order, and what does it answer? The same on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec

#: Ids that every tokenizer has as ordinary ones.
_TOKENS = range(300, 30_000)
#: Prompts that take turns.
_NUM_PROMPTS = 16
#: Tokens of an answer: one of each stage.
ANSWER_TOKENS = 2


class Order(msgspec.Struct, frozen=True):
    """Keep `in_flight` requests under way for `seconds`."""

    in_flight: int
    seconds: float


class Done(msgspec.Struct, frozen=True):
    """What came of it. Requests that began in time are finished, and counted here, however late."""

    ended_at: Sequence[float]  #: seconds since the order, of each request
    took_s: Sequence[float]  #: the same requests'

    def per_s(self, order: Order) -> float:
        """Requests that ended while all were under way."""
        return sum(at <= order.seconds for at in self.ended_at) / order.seconds


def make_prompts(tokens: int) -> list[list[int]]:
    """Prompts of so many ids, the same for both sides."""
    draw = random.Random(1)  # noqa: S311 - they are no secrets
    return [draw.choices(_TOKENS, k=tokens) for _ in range(_NUM_PROMPTS)]


def check(answer: Sequence[Any]) -> None:
    """Raises RuntimeError when that is no answer."""
    if len(answer) != ANSWER_TOKENS:
        raise RuntimeError(f"an answer has {len(answer)} tokens")
