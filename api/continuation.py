"""How does a stream of chunks go on when its request is run a second time?

The second run repeats what the first one has published, cut into other chunks.  What is known
already is taken out by its length: characters of each text, entries of each list of logprobs.
"""

from __future__ import annotations

import copy
from typing import Any

#: Fields of a choice whose text grows from chunk to chunk.
_TEXTS = ("text", "content", "reasoning", "reasoning_content", "refusal", "arguments")


class AnswerDiffers(Exception):
    """The second run's answer is another one."""


class Continuation:
    """Takes out of a run's chunks what `published` chunks of earlier runs have."""

    def __init__(self, published: list[dict[str, Any]]) -> None:
        """`published`: chunks in OpenAI's format."""
        self._texts: dict[tuple[Any, ...], str] = {}
        self._lengths: dict[tuple[Any, ...], int] = {}
        self._is_first = not published
        self._seen: set[tuple[Any, ...]] = set()  # tool calls that have been named
        for chunk in published:
            for choice in chunk.get("choices", ()):
                self._remember((choice["index"],), choice)

    def rest(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """What is new in `chunk`; None when nothing is.

        Raises AnswerDiffers when its text is not what was published.
        """
        if not self._texts and not self._lengths and self._is_first:
            return chunk
        choices = []
        for choice in chunk.get("choices", ()):
            own = copy.deepcopy(choice)
            has_new = self._cut((choice["index"],), own)
            if has_new or own.get("finish_reason") is not None:
                choices.append(own)
        if not choices and not chunk.get("usage"):
            return None
        return {**chunk, "choices": choices}

    def _remember(self, path: tuple[Any, ...], node: dict[str, Any]) -> None:
        for name, value in node.items():
            where = (*path, name)
            if name in _TEXTS and isinstance(value, str):
                self._texts[where] = self._texts.get(where, "") + value
            elif name == "tool_calls":
                for call in value or ():
                    self._seen.add((*path, call["index"]))
                    self._remember((*where, call["index"]), call)
            elif isinstance(value, dict):
                self._remember(where, value)
            elif isinstance(value, list):
                self._lengths[where] = self._lengths.get(where, 0) + len(value)

    def _cut(self, path: tuple[Any, ...], node: dict[str, Any]) -> bool:
        """Shorten what is in `node`; True when anything is left."""
        has_new = False
        for name, value in list(node.items()):
            where = (*path, name)
            if name in _TEXTS and isinstance(value, str):
                node[name] = self._cut_text(where, value)
                has_new |= bool(node[name])
            elif name == "tool_calls":
                node[name] = [c for c in value or () if self._cut_call(path, where, c)]
                has_new |= bool(node[name])
            elif isinstance(value, dict):
                has_new |= self._cut(where, value)
            elif isinstance(value, list):
                known = min(self._lengths.get(where, 0), len(value))
                if known:
                    self._lengths[where] -= known
                node[name] = value[known:]
                has_new |= bool(node[name])
        return has_new

    def _cut_call(
        self, path: tuple[Any, ...], where: tuple[Any, ...], call: dict[str, Any]
    ) -> bool:
        """A tool call's name and id come once, with the first chunk of it."""
        was_named = (*path, call["index"]) in self._seen and "id" in call
        if was_named:
            for name in ("id", "type"):
                call.pop(name, None)
            call.get("function", {}).pop("name", None)
        return self._cut((*where, call["index"]), call) or (not was_named and "id" in call)

    def _cut_text(self, where: tuple[Any, ...], text: str) -> str:
        known = self._texts.get(where, "")
        both = min(len(known), len(text))
        if known[:both] != text[:both]:
            raise AnswerDiffers
        if known:
            self._texts[where] = known[both:]
        return text[both:]
