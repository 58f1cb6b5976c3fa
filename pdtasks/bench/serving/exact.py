"""Is every answer what one engine would have said? Tokens and logprobs, greedy and seeded.

The topology that is asked first is the reference; ask one engine first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from pdtasks.bench.serving.client import TOKENS

#: As many greedy requests as seeded ones.
REQUESTS = 20
_PROMPT = 700  # tokens: several blocks, and no multiple of their size
_ANSWER = 32
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What was said to one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    loaded: int  #: blocks of the prompt that decode loaded
    recomputed: int


@dataclass(frozen=True)
class Comparison:
    """All answers beside the reference's."""

    topology: str
    reference: str
    requests: int
    same_tokens: int  #: requests
    worst_logprob_difference: float  #: of tokens up to the first that differs
    blocks_loaded: int
    blocks_recomputed: int

    def to_json(self) -> dict[str, Any]:
        """An object with these fields."""
        return asdict(self)


def ask_exact(url: str, model: str, *, reports: bool, requests: int = REQUESTS) -> list[Answer]:
    """Ask the same questions as ever, one after the other. Raises httpx.HTTPError."""
    rng = random.Random(15)  # noqa: S311 - the same questions for everybody
    answers = []
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        for number in range(requests):
            body = {
                "model": model,
                "prompt": rng.choices(TOKENS, k=_PROMPT),
                "max_tokens": _ANSWER,
                "ignore_eos": True,
                "temperature": number % 2,
                "seed": number,
                "logprobs": 1,
                "return_token_ids": True,
            }
            name = f"exact-{random.getrandbits(64):x}"
            headers = {"X-Request-Id": name}
            found = client.post("/v1/completions", json=body, headers=headers)
            choice = found.raise_for_status().json()["choices"][0]
            decode = _decode_report(client, name) if reports else {}
            answers.append(
                Answer(
                    tuple(choice["token_ids"]),
                    tuple(choice["logprobs"]["token_logprobs"]),
                    decode.get("kv_blocks_loaded", 0),
                    decode.get("kv_blocks_recomputed", 0),
                )
            )
    return answers


def compare(
    topology: str, answers: Sequence[Answer], reference: str, expected: Sequence[Answer]
) -> Comparison:
    """`answers` beside those that `reference` gave to the same questions."""
    same, worst = 0, 0.0
    for own, other in zip(answers, expected, strict=True):
        same += own.token_ids == other.token_ids
        for token, token2, value, value2 in zip(
            own.token_ids, other.token_ids, own.logprobs, other.logprobs, strict=False
        ):
            if token != token2:
                break
            worst = max(worst, abs(value - value2))
    return Comparison(
        topology,
        reference,
        len(answers),
        same,
        worst,
        sum(a.loaded for a in answers),
        sum(a.recomputed for a in answers),
    )


def _decode_report(client: httpx.Client, name: str) -> dict[str, Any]:
    report = client.get(f"/pdtasks/requests/cmpl-{name}").raise_for_status().json()
    found: dict[str, Any] = report["sequences"][0]["decode"]
    return found
