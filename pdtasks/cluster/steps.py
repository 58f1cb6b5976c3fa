"""How far is a child's start? In our words, by what its log says last."""

from __future__ import annotations

import re
from typing import Final

#: What a log says, and what begins then; the last one that is found counts.  The words on the left
#: are Celery's, vLLM 0.32's and ours: one that a new release changes leaves the step before it.
_STEPS: Final = (
    (r"starting the engine for", "starting the engine"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"(?i)downloading .*(weights|model|files)", "downloading the model"),
    (r"Starting to load model", "loading weights"),
    (r"Loading weights took", "warming up"),
    (r"torch\.compile takes|Compiling a graph", "compiling"),
    (r"Capturing CUDA graphs", "capturing CUDA graphs"),
    (r"the engine is ready after", "waiting for the queue"),
    (r"Waiting for application startup", "preparing its routes"),
    (r"Application startup complete", "waiting for workers"),
)
_PATTERNS: Final = tuple((re.compile(pattern), step) for pattern, step in _STEPS)

#: Before any of them is found.
FIRST: Final = "starting Python"


def step_of(log: str) -> str:
    """The step that a child is at whose `log` (of this start) is so long by now."""
    found, at = FIRST, -1
    for pattern, step in _PATTERNS:
        for match in pattern.finditer(log):
            if match.start() > at:
                found, at = step, match.start()
    return found
