"""What does a request tell the connector, and the connector the request's owner?

Both travel in vLLM's `kv_transfer_params`, under a key of our own::

    {"pdtasks": {"save": <transfer id>}}                       compute and write the prompt's KV
    {"pdtasks": {"load": <handle>, "resume": [token, …]}}      read it, go on after these tokens
    {"pdtasks": {"handle": <handle>}}                          at the end of a saved request
"""

from __future__ import annotations

from typing import Any

_KEY = "pdtasks"

Params = dict[str, Any]


def save(transfer_id: str) -> Params:
    """For the engine that computes a prompt."""
    return {_KEY: {"save": transfer_id}}


def load(handle: dict[str, Any] | None, tokens: list[int]) -> Params:
    """For the engine that goes on after `tokens`; without a handle it recomputes the prompt."""
    return {_KEY: {"load": handle, "resume": tokens}}


def saved(handle: dict[str, Any]) -> Params:
    """For whoever continues a request that was computed here."""
    return {_KEY: {"handle": handle}}


def ours(params: Params | None) -> dict[str, Any]:
    """Our part of `params`; empty for a request that is none of ours."""
    return (params or {}).get(_KEY) or {}
