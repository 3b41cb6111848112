"""Errors as clients of each API get them: `{"error": {"message", "type", "param", "code"}}` in OpenAI's."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from fastapi import Request
from fastapi.exceptions import HTTPException, RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as RoutingError
from starlette.responses import Response

from miniserve.api import fields
from miniserve.config import problem, tables
from miniserve.dispatcher import EngineError
from miniserve.monitor.events import TooManyListeners
from miniserve.sampling_params import ParameterError
from miniserve.scheduler.scheduler import QueueFull
from miniserve.text.messages import complaint

RETRY_SOON = {"Retry-After": "5"}
TABLES = tables("api/errors.toml")


def is_anthropic(scope: Mapping[str, Any]) -> bool:
    """Whether the client of a request speaks the Anthropic API. Models are at the same place in both."""
    if re.match("/v1/models(/|$)", scope["path"]):
        return any(name == b"anthropic-version" for name, _ in scope["headers"])
    return re.match("/v1/messages(/|$)", scope["path"]) is not None


class ApiError(HTTPException):
    """An answer other than 200. `message` is for the person who wrote the request; `param` names the field at fault. It
    is an HTTPException so that FastAPI lets it through when a middleware's `receive` raises it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        anthropic: Mapping[str, Any] | None = None,
    ) -> None:
        """`anthropic` is what clients of that API look for: other words, `details`."""
        # What clients sent may hold lone surrogates, which no UTF-8 body can carry.
        self.message = message.encode("utf-8", "backslashreplace").decode()
        self.param = None if param is None else param.encode("utf-8", "backslashreplace").decode()
        self.code = code
        self.anthropic = anthropic or {}
        super().__init__(status, self.message, dict(headers or {}))

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = TABLES["anthropic_types"].get(str(self.status_code), "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message, **self.anthropic}}

    def response(self, scope: Mapping[str, Any]) -> Response:
        """The whole answer to a request, in the shape that its client expects."""
        body = self.body
        if is_anthropic(scope):
            body = {**self.anthropic_body, "request_id": scope["state"]["request_id"]}
        return Response(msgspec.json.encode(body), self.status_code, self.headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """The answer for any exception. One that is not meant for clients becomes a 500 that says nothing of it."""
    match error:
        case ApiError():
            return error
        case ParameterError():
            return ApiError(400, error.message, param=error.param or None)
        case RequestValidationError():
            first = error.errors()[0]
            return _rejected({**first, "loc": first["loc"][1:]})  # which part of the request it is: the body, the query
        case QueueFull():
            after = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(503, str(error), code="queue_full", headers=after)
        case TooManyListeners():
            return ApiError(503, f"{error} Try again later.", code="too_many_listeners", headers={"Retry-After": "30"})
        case EngineError():
            return ApiError(503, str(error), code="engine_unavailable", headers=RETRY_SOON)
        case RoutingError(__cause__=UnicodeDecodeError() as cause):
            return ApiError(400, problem("api.not_utf8", cause=cause), code="invalid_json")
        case RoutingError(__cause__=ValueError() | RecursionError() as cause):
            return ApiError(400, f"The body is not valid JSON: {cause}.", code="invalid_json")
        case RoutingError():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "The server failed to answer this request; its log says why.", code="internal_error")


@contextmanager
def renamed(api: str) -> Iterator[None]:
    """Errors about a chat that was made from a request to another `api` of parameters.toml name its parameters."""
    try:
        yield
    except (ParameterError, ApiError, ValidationError) as error:
        about_chat = _rejected(error.errors()[0]) if isinstance(error, ValidationError) else as_api_error(error)
        param = about_chat.param or ""
        for pattern, name in fields.TABLES["names"][api].items():
            param = re.sub(f"^{pattern}(?![a-z_])", name, param)
        about_chat.message = about_chat.message.replace(f"`{about_chat.param}`", f"`{param}`")
        about_chat.param = param or None
        raise about_chat from error


async def answer(request: Request, error: Exception) -> Response:
    """The answer for any exception, in a running app."""
    answered = as_api_error(error)
    if isinstance(error, RoutingError) and not isinstance(error, ApiError) and error.status_code in (404, 405):
        # Where only a parameter takes a path nothing is there: other servers have it, like /v1/responses/compact.
        here = [route for route in request.app.routes if route.path == request.scope["path"]]
        methods = {method for route in here for method in route.methods}
        methods |= {"HEAD"} if "GET" in methods else set()
        wrong = "The wrong method:" if methods else "There is nothing at"
        message = f"{wrong} {request.method} {request.url.path}. GET /docs shows what there is."
        allow = {"Allow": ", ".join(sorted(methods))} if methods else None
        answered = ApiError(405 if methods else 404, message, headers=allow)
    return answered.response(request.scope)


FORESEEN = ParameterError, RequestValidationError, QueueFull, TooManyListeners, EngineError, RoutingError
"""What routes raise. All else goes on to uvicorn behind its answer, which logs the traceback."""


def _rejected(first: Mapping[str, Any]) -> ApiError:
    """The error for a field that pydantic rejects; `first` is pydantic's account of it."""
    if first["type"] == "json_invalid":
        reason, at = first["ctx"]["error"], first["loc"][-1]
        return ApiError(400, f"The body is not valid JSON: {reason} at character {at}.", code="invalid_json")
    path, reason = complaint(first)
    if not path:
        if isinstance(cause := first.get("ctx", {}).get("error"), ParameterError):
            return ApiError(400, cause.message, param=cause.param)
        return ApiError(400, "The body must be a JSON object, sent with `Content-Type: application/json`.")
    if first["type"] == "missing":
        return ApiError(400, f"`{path}` is missing.", param=path, code="missing_required_parameter")
    return ApiError(400, f"`{path}`: {reason}.", param=path)
