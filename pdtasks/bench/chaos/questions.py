"""What is asked? A fixed set, so that every answer can be known before anything fails."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Tokens of short answers, at least and at most.
SHORT = (2, 12)
_WORDS = ("river", "stone", "letter", "garden", "window", "silver", "market", "winter", "bridge")
#: Beginnings that a small model goes on with for a while.
_BEGINNINGS = (
    "Here is a short story about a",
    "The following list explains the",
    "Once upon a time there was a",
    "In this chapter we learn about the",
)


@dataclass(frozen=True)
class Question:
    """One request's body, without how it is streamed."""

    number: int
    prompt: str
    max_tokens: int
    seed: int | None  #: None: greedy

    @property
    def is_short(self) -> bool:
        """For who sees nothing before the end: its wait is not the answer's length."""
        return self.max_tokens <= SHORT[1]

    def body(self, model: str) -> dict[str, Any]:
        """For `/v1/completions`, or a job."""
        sampling: dict[str, Any] = {"temperature": 0}
        if self.seed is not None:
            sampling = {"temperature": 0.8, "seed": self.seed}
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            **sampling,
        }


def make_questions(seed: int, count: int, longest: int) -> Sequence[Question]:
    """`count` questions, every second one seeded, every third one short (`SHORT`).

    Args:
        longest: tokens of an answer.
    """
    rng = random.Random(seed)  # noqa: S311 - not a secret
    found = []
    for number in range(count):
        words = " ".join(rng.choices(_WORDS, k=rng.randint(4, 200)))
        prompt = f"{rng.choice(_BEGINNINGS)} {words}. Number {number}:"
        own_seed = rng.getrandbits(31) if number % 2 else None
        shortest, most = SHORT if number % 3 == 0 else (SHORT[1], longest)
        found.append(Question(number, prompt, rng.randint(shortest, most), own_seed))
    return found
