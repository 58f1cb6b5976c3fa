"""Where does an answer's text begin? Behind the prompt, even if that ends inside a character.

A prompt of token ids may end between the bytes of one UTF-8 character.  vLLM's stream of text then
finds no place to begin and gives the whole prompt with the first token (its issue 48853).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

#: What a decoder writes for bytes that are no character (yet).
_BROKEN = "\ufffd"
#: Tokens that an unfinished character may have at most: of four bytes one is missing.
_MOST_UNFINISHED = 3
#: Tokens before it that decide how it is decoded.
_CONTEXT = 16


class _ContinuedStream:
    """A `DecodeStream` whose first text begins with `known`, which the prompt has already."""

    def __init__(self, stream: DecodeStream, known: str) -> None:
        self._stream = stream
        self._known = known

    def step(self, tokenizer: Tokenizer, token_id: int) -> str | None:
        text: str | None = self._stream.step(tokenizer, token_id)
        if text:
            text, self._known = text.removeprefix(self._known), ""
        return text


def begin_behind_prompt(detokenizer: IncrementalDetokenizer, request: EngineCoreRequest) -> None:
    """Have a new `detokenizer` of `request` give no text of the prompt."""
    if not isinstance(detokenizer, FastIncrementalDetokenizer):
        return  # the slow one, for tokenizers in Python, counts tokens itself
    tokenizer, skips_special = detokenizer.tokenizer, detokenizer.skip_special_tokens

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=skips_special)
        return text

    prompt = request.prompt_token_ids or []
    tail = prompt[-_CONTEXT:]
    if not decode(tail).endswith(_BROKEN):
        return
    for unfinished in range(1, min(_MOST_UNFINISHED, len(tail)) + 1):
        whole = tail[:-unfinished]
        if decode(whole).endswith(_BROKEN):
            continue
        stream: Any = DecodeStream(
            ids=prompt[: len(prompt) - unfinished], skip_special_tokens=skips_special
        )
        for token_id in tail[-unfinished:]:
            stream.step(tokenizer, token_id)
        known = decode(tail).rstrip(_BROKEN)[len(decode(whole)) :]
        detokenizer.stream = _ContinuedStream(stream, known)  # type: ignore[assignment]  # as one
        return
