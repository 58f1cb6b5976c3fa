"""Which model answers? The one that a body names; the list of those that are alive."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.front import Fronts, model_in
from api.guard import BODY, error_response

router = APIRouter()

PATH: Final = "/v1/models"


class ByModel:
    """ASGI layer behind the guard: hands a request to the front half of the model that it names.

    One that names none is the default model's.
    """

    def __init__(self, app: ASGIApp, *, fronts: Fronts) -> None:
        self._app = app
        self._default = fronts.default
        self._fronts = fronts
        # What is not of vLLM's front half (jobs, files, batches) asks for itself.
        self._paths = {
            path
            for front in fronts
            if front is not fronts.default
            for route in front.app.routes
            if (path := getattr(route, "path", ""))
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = self._model(scope)
        if isinstance(model, str) and model and model not in self._fronts:
            await self._unknown(model)(scope, receive, send)
            return
        front = self._fronts.of(model)
        if front is self._default:
            await self._app(scope, receive, send)
            return
        # A worker of this model may have come this moment.
        await front.core.workers.look_again()
        await front.app(scope, receive, send)

    def _model(self, scope: Scope) -> Any:
        body = scope.get("state", {}).get(BODY) if scope["type"] == "http" else None
        if not body or scope["path"].removeprefix(scope.get("root_path", "")) not in self._paths:
            return None
        return model_in(body)

    def _unknown(self, model: str) -> JSONResponse:
        known = ", ".join(front.name for front in self._fronts)
        return error_response(404, f"The model `{model}` does not exist, but: {known}", "model")


def install(app: FastAPI, fronts: Fronts) -> None:
    """Have `app`, the default model's, list those that are alive."""
    app.state.pdtasks_fronts = fronts
    for front in fronts:
        if front.app is not app:
            _leave_routes_alone(front.app)
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", "") != PATH
    ]
    app.include_router(router)


def _leave_routes_alone(app: FastAPI) -> None:
    """Leave `app` its routes and how they answer errors; what stands before them is the process's.

    CORS, keys and counts of HTTP requests are of the address that is asked, not of a model; and
    what nobody handles the guard answers.
    """
    app.user_middleware.clear()
    outermost: Any = app.build_middleware_stack()  # Starlette's answer to what nobody handles
    app.middleware_stack = outermost.app


@router.get(PATH)
async def list_models(request: Request) -> JSONResponse:
    """Those whose stages have workers, of the models that this API serves."""
    fronts: Fronts = request.app.state.pdtasks_fronts
    alive = [front for front in fronts if front.core.workers.is_alive]
    lists = [await front.app.state.openai_serving_models.show_available_models() for front in alive]
    data = [model.model_dump() for one in lists for model in one.data]
    return JSONResponse({"object": "list", "data": data})
