"""What unit tests share: no service, no weights."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest

from pdtasks import collecting


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """Import vLLM, where a test module uses it, before pytest makes its warnings errors.

    It takes seconds and warns of things that are no business of ours.
    """
    if "vllm" in module_path.read_text():
        with warnings.catch_warnings(), collecting.rarely():
            warnings.simplefilter("ignore")
            importlib.import_module("api.client")
