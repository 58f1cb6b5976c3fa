"""Which requests does one message carry? One, or several answers to the same prompt."""

from __future__ import annotations

from typing import Final

from vllm.v1.engine import EngineCoreRequest

from api.line import Flow
from api.route import Wish
from api.tracing import AskedSpan
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.wire import encode_request
from pdtasks.errors import InvalidRequest
from pdtasks.messages import PrefillJob, Sibling, is_name

#: RabbitMQ's limit for an identifier is 255 bytes; vLLM and Celery add some.
_MAX_ID_BYTES: Final = 200


class Family:
    """Requests that one message carries, and what is said of all of them."""

    def __init__(
        self,
        request: EngineCoreRequest,
        flow: Flow,
        submitted_at: float,
        most: int,
        *,
        span: AskedSpan,
        wish: Wish,
    ) -> None:
        """Args:
        submitted_at: UNIX seconds.
        most: requests that it takes.
        wish: their caller's, for their way.
        """
        self.requests = [request]
        self.flow = flow
        self.span = span
        self.wish = wish
        self._most = most
        self._submitted_at = submitted_at

    @property
    def first(self) -> EngineCoreRequest:
        return self.requests[0]

    @property
    def request_ids(self) -> list[str]:
        return [request.request_id for request in self.requests]

    def takes(self, request: EngineCoreRequest) -> bool:
        """Is `request` one more of those that vLLM makes of one with n > 1?

        They are copies of it, but for id and seed.
        """
        return (
            len(self.requests) < self._most
            and request.prompt_token_ids is self.first.prompt_token_ids
            and request.external_req_id == self.first.external_req_id
        )

    def job(self, model: str, deadline: float, *, tells_start: bool) -> PrefillJob:
        """The message. Raises InvalidRequest.

        Args:
            model: its name, to be compared with the worker's.
            deadline: UNIX seconds.
            tells_start: whether workers say when they begin.
        """
        first, *others = self.requests
        for request_id in self.request_ids:
            _require_usable_id(request_id)
        return PrefillJob(
            request_id=first.request_id,
            engine=ENGINE_VERSION,
            model=model,
            request=encode_request(first),
            submitted_at=self._submitted_at,
            deadline=deadline,
            tells_start=tells_start,
            siblings=tuple(
                Sibling(request_id=one.request_id, seed=one.sampling_params.seed)
                for one in others
                if one.sampling_params is not None
            ),
        )


def _require_usable_id(request_id: str) -> None:
    if len(request_id.encode()) > _MAX_ID_BYTES:
        raise InvalidRequest(
            f"the X-Request-Id is too long: {_MAX_ID_BYTES} bytes at most, with what vLLM adds"
        )
    if not is_name(request_id):
        raise InvalidRequest("the X-Request-Id has control characters")
