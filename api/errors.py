"""How do errors look that no route makes itself? Like OpenAI's, with the field that is wrong."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_type_hints

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError, VLLMValidationError

from api.guard import BODY, error_response, response_of
from pdtasks.errors import PdtasksError

#: What a field of an unexpected kind makes vLLM's validators raise, beside what they mean to.
SURPRISES = (AttributeError, TypeError, KeyError, IndexError, RecursionError)

_Outcome = Literal["valid", "refused", "surprise"]

#: Fields that ask for an answer of a certain form, and how vLLM speaks of them without a name.
_STRUCTURED = ("structured_outputs", "response_format")
_OF_STRUCTURE = re.compile(r"grammar|schema|regex|structur|choice", re.IGNORECASE)


def install(app: FastAPI) -> None:
    """Have `app` answer its framework's errors, vLLM's and ours in one shape."""
    others = dict(app.exception_handlers)

    async def of_framework(_request: Request, exc: HTTPException) -> JSONResponse:
        response = error_response(exc.status_code, str(exc.detail))
        response.headers.update(exc.headers or {})
        return response

    async def of_vllm(request: Request, exc: Exception) -> Any:
        better = explained(exc, _body(request))
        if better is not exc:
            error = create_error_response(better).error
            return error_response(error.code, error.message, error.param)
        response = await others[VLLMError](request, exc)
        response.headers.update(getattr(exc, "headers", {}))
        return response

    async def of_surprise(request: Request, exc: Exception) -> Any:
        model = _body_model(request)
        field = None if model is None else unreadable_field(model, _body(request))
        if field is not None:
            return error_response(400, f"{field}: cannot be understood", field)
        if isinstance(exc, RecursionError):
            return error_response(400, "the body is nested too deeply")
        # An error of the server: the guard answers and logs it, without its text.
        raise exc

    async def of_ours(_request: Request, exc: PdtasksError) -> JSONResponse:
        return response_of(exc)

    app.exception_handler(HTTPException)(of_framework)
    app.exception_handler(VLLMError)(of_vllm)
    app.exception_handler(PdtasksError)(of_ours)
    for surprise in SURPRISES:
        app.exception_handler(surprise)(of_surprise)
    # The guard does it, and logs no text; Starlette would log all of it.
    app.exception_handlers.pop(Exception, None)


def explained(exc: Exception, body: dict[str, Any]) -> Exception:
    """`exc`, or one that says better what is wrong with the request `body`."""
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    if (
        isinstance(exc, VLLMValidationError)
        and exc.parameter == "max_tokens"
        and exc.value == 0
        and asked != 0
    ):
        return VLLMValidationError(
            "the prompt fills the model's whole context, so that nothing is left for an answer: "
            "shorten the prompt",
            parameter="prompt",
        )
    if (
        isinstance(exc, VLLMValidationError)
        and exc.parameter is None
        and _OF_STRUCTURE.search(str(exc))
        and (named := next((name for name in _STRUCTURED if body.get(name)), None))
    ):
        return VLLMValidationError(f"{named}: {exc}", parameter=named)
    return exc


def unreadable_field(model: type[BaseModel], body: dict[str, Any]) -> str | None:
    """The field of `body` on which the validators of `model` stumble, if they do."""
    if _outcome(model, body) != "surprise":
        return None
    without = {
        str(name): _outcome(model, {key: value for key, value in body.items() if key != name})
        for name in body
    }
    # Rather one that the rest can do without than one whose lack is complained of earlier.
    for outcome in ("valid", "refused"):
        if named := [name for name, found in without.items() if found == outcome]:
            return named[0]
    return "body"


def _outcome(model: type[BaseModel], body: dict[str, Any]) -> _Outcome:
    try:
        model.model_validate(body)
    except SURPRISES:
        return "surprise"
    except Exception:  # noqa: BLE001 - in words
        return "refused"
    return "valid"


def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(request.scope["state"][BODY])
    except (KeyError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _body_model(request: Request) -> type[BaseModel] | None:
    endpoint = getattr(request.scope.get("route"), "endpoint", None)
    if endpoint is None:
        return None
    hints = get_type_hints(endpoint).values()
    return next((h for h in hints if isinstance(h, type) and issubclass(h, BaseModel)), None)
