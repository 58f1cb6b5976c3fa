"""What did the stages do for a request that finished lately?"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreRequest

from pdtasks.messages import StageReport
from pdtasks.naming import STAGES

#: Requests whose reports can still be asked for.
_REMEMBERED = 1000
#: Seconds in which a worker reports of a request that was ended here.
_LATE_S = 2.0


@dataclass
class _Known:
    """One sequence."""

    external_id: str
    ended_here: bool = False  #: and no report has come since
    by_stage: dict[str, StageReport] = field(default_factory=dict)


class Reports:
    """The reports of the last requests, by the name that the caller knows. For one event loop.

    A stage may report twice of a request: prefill hands over before its blocks are saved, and a
    stage whose worker was lost is run again.  The later one counts, from its own worker.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def expect(self, request: EngineCoreRequest) -> None:
        """Reports of `request` will come."""
        name = request.external_req_id or request.request_id
        self._known[request.request_id] = _Known(name)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def ended_here(self, request_id: str) -> None:
        """This process has ended it itself, at a stop string perhaps."""
        if known := self._known.get(request_id):
            known.ended_here = True

    def take(self, request_id: str, reports: Iterable[StageReport], *, said_by: str) -> None:
        """A worker of stage `said_by` says what was done; of others' stages it knows less."""
        if known := self._known.get(request_id):
            known.ended_here = False
            for report in reports:
                if report.stage == said_by:
                    known.by_stage[report.stage] = report
                else:
                    known.by_stage.setdefault(report.stage, report)

    async def of(self, external_id: str) -> list[tuple[StageReport, ...]]:
        """The reports of `external_id`, one entry for each sequence.

        Waits a moment for those of a sequence that this process has ended itself.
        """
        # vLLM numbers the prompts of one completion request: <id>-0, <id>-1, …
        numbered = re.compile(re.escape(external_id) + r"(-\d+)?")
        found = [k for k in self._known.values() if numbered.fullmatch(k.external_id)]
        with suppress(TimeoutError):
            async with asyncio.timeout(_LATE_S):
                while any(known.ended_here for known in found):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        return [
            tuple(known.by_stage[stage] for stage in STAGES if stage in known.by_stage)
            for known in found
            if known.by_stage
        ]
