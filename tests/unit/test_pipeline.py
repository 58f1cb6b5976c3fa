"""How does a request get into the pipeline? What can be said without a broker."""

from __future__ import annotations

import pytest

from pdtasks.errors import InvalidRequest
from pdtasks.pipeline import submit


@pytest.mark.parametrize("both", [True, False])
def test_a_request_has_either_a_prompt_or_messages(both: bool) -> None:
    with pytest.raises(InvalidRequest, match="either"):
        submit("a" if both else None, messages=[] if both else None)
