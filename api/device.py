"""Which device does vLLM take an API process to be on? None: it computes nothing."""

from __future__ import annotations

import os

from pdtasks.settings import Settings


def use_none(settings: Settings) -> None:
    """Call before anything imports vLLM, which looks for a device at once.

    On a host without the workers' GPUs it would find none, and end.
    """
    if settings.device == "cuda":
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
