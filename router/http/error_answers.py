"""How an application answers errors: in OpenAI's form, or in Anthropic's on its paths."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from tensorweave.cluster.errors import RequestCancelled, RequestRejected, TensorweaveError
from tensorweave.router.http import asgi


class UnknownRoute(RequestRejected):
    http_status, code = 404, "not_found"


class MethodNotAllowed(RequestRejected):
    http_status, code = 405, "method_not_allowed"


def add_error_answers(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(TensorweaveError, _answer_error)
    app.add_exception_handler(asgi.ClientGone, _answer_client_gone)
    app.add_exception_handler(Exception, _answer_internal_error)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TensorweaveError)
    response = Response(
        asgi.error_body(request.scope, error), status_code=error.http_status, media_type="application/json"
    )
    for name, value in asgi.error_headers(error):
        response.headers[name.decode()] = value.decode()
    return response


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer what Starlette itself refuses: an unknown route, or a wrong method. OPTIONS gets the allowed methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=error.headers)
    where = f"{request.method} {request.url.path[:256]}"
    match error.status_code:
        case 404:
            response = await _answer_error(request, UnknownRoute(f"no route: {where}"))
        case 405:
            response = await _answer_error(request, MethodNotAllowed(f"method not allowed: {where}"))
        case _:
            response = await _answer_error(request, RequestRejected(str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _answer_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=RequestCancelled.http_status)


async def _answer_internal_error(request: Request, error: Exception) -> Response:
    return await _answer_error(request, TensorweaveError("internal error; see the server's log"))
