"""What does a request tell the connector, and the connector the request's owner?

Both travel in vLLM's `kv_transfer_params`, under a key of our own::

    {"pdtasks": {"save": <transfer id>}}                       compute and write the prompt's KV
    {"pdtasks": {"load": <handle>, "resume": [token, …]}}      read it, go on after these tokens
    {"pdtasks": {"resume": [token, …]}}                        compute it here, go on after these
    {"pdtasks": {"handle": <handle>}}                          at the end of a saved request
"""

from __future__ import annotations

from typing import Any

_KEY = "pdtasks"
_LONGEST_NAME = 512  # characters

Params = dict[str, Any]


def save(transfer_id: str) -> Params:
    """For the engine that computes a prompt."""
    return {_KEY: {"save": transfer_id}}


def load(handle: dict[str, Any] | None, tokens: list[int]) -> Params:
    """For the engine that goes on after `tokens`; without a handle it recomputes the prompt."""
    return {_KEY: {"load": handle, "resume": tokens}}


def resume(tokens: list[int]) -> Params:
    """For the engine that computes a prompt and answers it, after `tokens` that are there."""
    return {_KEY: {"resume": tokens}}


def saved(handle: dict[str, Any]) -> Params:
    """For whoever continues a request that was computed here."""
    return {_KEY: {"handle": handle}}


def ours(params: Params | None) -> dict[str, Any]:
    """Our part of `params`; empty for a request that is none of ours."""
    found = (params or {}).get(_KEY)
    return found if isinstance(found, dict) else {}


def check(params: Params | None, *, num_prompt: int, vocabulary: int, max_tokens: int) -> None:
    """Raises ValueError for what an engine could not survive.

    Under plain `vllm serve` a client may have written it.

    Args:
        num_prompt: tokens of the prompt.
        vocabulary: token ids are below this.
        max_tokens: the engine's context.
    """
    if params is None or _KEY not in params:
        return
    wants = params[_KEY]
    if not isinstance(wants, dict):
        raise ValueError("no map")  # noqa: TRY004 - a wrong value, from a client
    name = wants.get("save")
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME):
        raise ValueError("save: no name")
    tokens = wants.get("resume") or []
    if not isinstance(tokens, list) or num_prompt + len(tokens) >= max_tokens:
        raise ValueError("resume: no list that fits into the context")
    if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise ValueError("resume: no token ids")
