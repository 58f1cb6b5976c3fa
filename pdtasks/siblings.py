"""How does one job for several answers to a prompt become a job for each?"""

from __future__ import annotations

import msgspec

from pdtasks.engine.wire import sibling_of
from pdtasks.errors import InvalidRequest
from pdtasks.messages import DecodeJob, PrefillJob


def apart(job: PrefillJob) -> list[PrefillJob]:
    """A job for each answer. On the one loop that reads requests. Raises InvalidRequest."""
    found = [msgspec.structs.replace(job, siblings=())]
    if job.siblings and job.request is None:
        raise InvalidRequest("only a request that is tokenised has siblings")
    for one in job.siblings:
        assert job.request is not None
        wire = sibling_of(job.request, one.request_id, one.seed)
        found.append(msgspec.structs.replace(found[0], request_id=one.request_id, request=wire))
    return found


def whole(job: PrefillJob) -> list[DecodeJob]:
    """A job for each answer, for workers that compute the prompt as well. Like `apart`."""
    return [_whole(one) for one in apart(job)]


def _whole(job: PrefillJob) -> DecodeJob:
    if job.request is None:
        raise InvalidRequest("only a request that is tokenised is answered by one worker")
    return DecodeJob(
        request_id=job.request_id,
        engine=job.engine,
        model=job.model,
        request=job.request,
        output_token_ids=(),
        handle=None,
        prefill=None,
        detokenise=False,
        submitted_at=job.submitted_at,
        prefilled_at=job.submitted_at,
        first_token_at=0.0,
        deadline=job.deadline,
        tells_start=job.tells_start,
    )
