"""Requests whose hand-over has to be exact: each kind of sampling, one block and several."""

from __future__ import annotations

from typing import Any, Final

from tests.acceptance.parameter_cases import Case, chat

SAMPLINGS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 7},
    "seeded with top-k, top-p and min-p": {
        "temperature": 1.2,
        "seed": 11,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
    },
    "frequency penalty": {"temperature": 0, "frequency_penalty": 1.2},
    "presence penalty": {"temperature": 0, "presence_penalty": 1.5},
    "repetition penalty": {"temperature": 0, "repetition_penalty": 1.25},
    "seeded with penalties": {
        "temperature": 0.9,
        "seed": 3,
        "frequency_penalty": 0.8,
        "presence_penalty": 0.7,
        "repetition_penalty": 1.1,
    },
    "min tokens against an eos bias": {
        "temperature": 0,
        "min_tokens": 8,
        "logit_bias": {"2": 100.0},
    },
    "bad words": {"temperature": 0, "bad_words": ["The capital"]},
    "stop token": {"temperature": 0, "stop_token_ids": [3575, 28]},
    "JSON schema": {
        "temperature": 0,
        "structured_outputs": {
            "json": {
                "type": "object",
                "properties": {"a": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["a", "n"],
                "additionalProperties": False,
            }
        },
    },
    "regex, seeded": {
        "temperature": 1.0,
        "seed": 5,
        "structured_outputs": {"regex": "(ab|cd|ef){5}-[0-9]{4}"},
    },
    "one token": {"temperature": 0, "max_tokens": 1},
}
PROMPTS: Final = {
    "a short prompt": "What is the capital of France?",
    "a prompt of several blocks": "Write a list of words about the sea. " * 30 + "Now begin.",
}


def _cases() -> dict[str, Case]:
    """Each with a first word of its own, so that no prefix is cached anywhere."""
    wanted: dict[str, Any] = {"max_tokens": 16, "logprobs": True, "return_token_ids": True}
    pairs = [(sampling, prompt) for sampling in SAMPLINGS for prompt in PROMPTS]
    return {
        f"{sampling}, {prompt}": chat(
            f"{number}. {PROMPTS[prompt]}", **wanted | SAMPLINGS[sampling]
        )
        for number, (sampling, prompt) in enumerate(pairs)
    }


CASES: Final = _cases()
