"""What did the stages do for a request that finished lately?"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict, deque
from contextlib import suppress

from vllm.v1.engine import EngineCoreRequest

from pdtasks.messages import StageReport

#: Requests whose reports can still be asked for.
_REMEMBERED = 1000
#: Seconds in which a worker reports of a request that was ended here.
_LATE_S = 2.0


class Reports:
    """The reports of the last requests, by the name that the caller knows. For one event loop."""

    def __init__(self) -> None:
        self._reports: deque[tuple[str, tuple[StageReport, ...]]] = deque(maxlen=_REMEMBERED)
        #: No report has come yet. By request: its name for the caller.
        self._ended_here: OrderedDict[str, str] = OrderedDict()

    def remember(self, request: EngineCoreRequest, reports: tuple[StageReport, ...]) -> None:
        """`request` has ended, or is about to."""
        self._reports.append((_external_id(request), reports))

    def ended_here(self, request: EngineCoreRequest) -> None:
        """This process has ended `request` itself, at a stop string perhaps: reports will come."""
        self._ended_here[request.request_id] = _external_id(request)
        if len(self._ended_here) > _REMEMBERED:
            self._ended_here.popitem(last=False)

    def remember_late(self, request_id: str, reports: tuple[StageReport, ...]) -> None:
        """What workers report of a request that is not open any more."""
        if external_id := self._ended_here.pop(request_id, None):
            self._reports.append((external_id, reports))

    async def of(self, external_id: str) -> list[tuple[StageReport, ...]]:
        """The reports of `external_id`, one entry for each sequence.

        Waits a moment for those of a sequence that this process has ended itself.
        """
        # vLLM numbers the prompts of one completion request: <id>-0, <id>-1, …
        numbered = re.compile(re.escape(external_id) + r"(-\d+)?")
        with suppress(TimeoutError):
            async with asyncio.timeout(_LATE_S):
                while any(map(numbered.fullmatch, self._ended_here.values())):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        return [reports for name, reports in self._reports if numbered.fullmatch(name)]


def _external_id(request: EngineCoreRequest) -> str:
    return request.external_req_id or request.request_id
