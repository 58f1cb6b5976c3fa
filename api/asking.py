"""How is a request asked that came with no connection? Of vLLM's own handlers, from its body.

What jobs and batches share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, Request
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from api.errors import SURPRISES, explained, unreadable_field
from api.recording import Checked, only_checking
from pdtasks.errors import PdtasksError

AnyRequest = ChatCompletionRequest | CompletionRequest | ResponsesRequest


@dataclass(frozen=True)
class Route:
    """How the body of one of vLLM's routes is served."""

    request: type[AnyRequest]
    handler: str  #: its name in the app's state
    method: str


ROUTES: Final = {
    "/v1/chat/completions": Route(
        ChatCompletionRequest, "openai_serving_chat", "create_chat_completion"
    ),
    "/v1/completions": Route(CompletionRequest, "openai_serving_completion", "create_completion"),
    "/v1/responses": Route(ResponsesRequest, "openai_serving_responses", "create_responses"),
}

#: How a whole answer is asked for, whatever the body says.
WHOLE: Final[dict[str, Any]] = {"stream": False}
#: Names of KV belong to the workers: a client's could be those of somebody else's prompt.  How an
#: answer is made is our own business.
_NOT_THE_CALLERS: Final = ("kv_transfer_params", "vllm_xargs", "stream", "stream_options")


class Refused(Exception):
    """A request is not taken."""

    def __init__(self, status: int, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


class Failed(Exception):
    """The answer is this error, in OpenAI's format."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error.get("type"))
        self.error = error


class NotNow(Exception):
    """The stack has no workers or no room, or has lost the request: it may be asked again."""

    def __init__(self, exc: GracefulHTTPError, error: dict[str, Any]) -> None:
        super().__init__(type(exc).__name__)
        #: What has happened, where it is one of ours.
        self.cause: PdtasksError | None = getattr(exc, "error", None)
        self.error = error


def without_what_is_ours(body: dict[str, Any]) -> dict[str, Any]:
    """`body` as far as a caller may have a say."""
    return {name: value for name, value in body.items() if name not in _NOT_THE_CALLERS}


def read_request(path: str, body: dict[str, Any]) -> AnyRequest:
    """The request that `body` is. Raises Refused."""
    kind = ROUTES[path].request
    try:
        return kind.model_validate(body)
    except VLLMValidationError as exc:
        raise Refused(400, str(exc), exc.parameter) from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Refused(400, f"{where}: {first['msg']}", where) from exc
    except SURPRISES as exc:
        field = unreadable_field(kind, body) or "body"
        raise Refused(400, f"{field}: cannot be understood", field) from exc


def app_of(app: FastAPI, body: Mapping[str, Any]) -> FastAPI:
    """The application that serves the model which `body` names; for others `app`, which says so."""
    fronts = getattr(app.state, "pdtasks_fronts", None)
    found: FastAPI = app if fronts is None else fronts.app_of(body.get("model"))
    return found


async def check(app: FastAPI, path: str, body: dict[str, Any]) -> None:
    """Find out all that can be known of a request before it is begun.

    Raises Refused with the answer that its route would give at once.
    """
    app = app_of(app, body)
    handler = getattr(app.state, ROUTES[path].handler)
    with only_checking():
        try:
            request = ROUTES[path].request.model_validate(body | WHOLE)
            answer = await getattr(handler, ROUTES[path].method)(request, None)
        except Checked:
            return
        except PdtasksError as exc:
            raise Refused(exc.http_status, str(exc), None) from exc
        except Exception as exc:
            error = handler.create_error_response(explained(exc, body)).error
            raise Refused(error.code, error.message, error.param) from exc
    if getattr(answer, "error", None) is not None:
        raise Refused(answer.error.code, answer.error.message, answer.error.param)


async def ask(
    app: FastAPI, path: str, body: dict[str, Any], changes: dict[str, Any], request_id: str
) -> Any:
    """What vLLM's handler answers to `body` with `changes`. Raises Refused, Failed, NotNow."""
    route = ROUTES[path]
    app = app_of(app, body)
    handler = getattr(app.state, route.handler)
    request = read_request(path, body | changes)
    headers = [(b"x-request-id", request_id.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    raw_request = Request(scope | {"app": app, "query_string": b"", "state": {}})
    try:
        answer = await getattr(handler, route.method)(request, raw_request)
    except GracefulHTTPError as exc:
        error = handler.create_error_response(exc).error.model_dump()
        if exc.http_status in (429, 503):
            raise NotNow(exc, error) from exc
        raise Failed(error) from exc
    except Exception as exc:
        error = handler.create_error_response(explained(exc, body)).error
        raise Failed(error.model_dump()) from exc
    if hasattr(answer, "error") and answer.error is not None:
        raise Failed(answer.error.model_dump())
    return answer


def whole_body(answer: Any) -> dict[str, Any]:
    """What vLLM's route would send of `answer`."""
    return dict(answer.model_dump(mode="json", by_alias=True))
