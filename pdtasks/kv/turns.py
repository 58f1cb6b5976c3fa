"""Which prompts does an engine compute in one step? Whole ones, in turn.

vLLM fills a step with the beginning of the next prompt: then the first token of the one before
waits for work that is not its own, and the next one's comes no sooner.  Of two prompts that each
keep the processor busy, one after the other gives the first half as late a token and the second
none later.  Prompts that are so short that they do not keep it busy are computed together.
"""

from __future__ import annotations


class Turns:
    """The room that one step has for prompts."""

    def __init__(self, full_step: int | None) -> None:
        """`full_step`: tokens that keep the processor busy; None: no limit but vLLM's."""
        self._full_step = full_step
        self._taken = 0

    def take(self, num_tokens: int) -> bool:
        """Is it the turn of a prompt that has so many tokens left? It is, when no other has one."""
        taken = self._taken + num_tokens
        if self._taken and self._full_step is not None and taken > self._full_step:
            return False
        self._taken = taken
        return True

    def next_step(self, num_left: int) -> None:
        """`num_left`: tokens of prompts that the last step has begun and not ended."""
        self._taken = num_left
