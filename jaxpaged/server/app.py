"""The application: which route is answered by whom, behind the door.

Knows routes. Refuses to know what the answers say.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.host.request import RequestError
from jaxpaged.server import chat, completions, embeddings, operating, responses, texts
from jaxpaged.server.bodies import Body, dump_json
from jaxpaged.server.errors import ApiError, as_api_error
from jaxpaged.server.guard import Guard
from jaxpaged.server.metrics import CONTENT_TYPE, Metrics
from jaxpaged.server.options import ServerOptions
from jaxpaged.server.protocol import CHAT, COMPLETION, DETOKENIZE, EMBEDDING, RESPONSE, TOKENIZE
from jaxpaged.server.service import Asked, Service
from jaxpaged.server.states import add_views
from jaxpaged.server.tracing import Tracer, otlp_tracer
from jaxpaged.server.ui.routes import add_page
from jaxpaged.server.watching import Book, Watching
from jaxpaged.streams import EngineError
from jaxpaged.version import __version__

_LARGE_BYTES = 64 << 10  # a body or an answer of which is read or written on a thread, for it takes a millisecond and more

Answering = Callable[[Service, Asked], Awaitable[Any]]


class _Bare(APIRoute):
    """A route that is documented as any other, and whose function gets the request itself: the framework's own reading of bodies,
    parameters and answers, which it does not need, costs as much as all that is done for a short request here.
    """

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """See Starlette's `Route`."""
        if scope["method"] not in (self.methods or ()):
            return await super().handle(scope, receive, send)  # which refuses it
        answer = await self.endpoint(Request(scope, receive, send))
        await answer(scope, receive, send)


def build_app(llm: AsyncLLM, options: ServerOptions | None = None, *, tracer: Tracer | None = None, **injected: Any) -> FastAPI:
    """The ASGI application that serves a model. Who runs it also ends the model: see `AsyncLLM.shutdown`.

    Args:
      tracer: in place of the one that otlp_traces_endpoint asks for.
      injected: `make_id` and `time_s` of `Service`, for tests.

    Raises:
      ConfigError: of `ServerOptions.all_keys`, or traces are asked for and OpenTelemetry is not installed.
    """
    options = options or ServerOptions()
    service = Service(llm, options, **injected)
    options_of_app: dict[str, Any] = {"docs_url": None, "redoc_url": None, "lifespan": _lifespan}
    # A redirect would lead to whatever Host the request has named.
    app = FastAPI(title="jaxpaged", version=__version__, redirect_slashes=False, **options_of_app)
    app.state.service = service
    if options.otlp_traces_endpoint is not None and tracer is None:
        tracer = otlp_tracer(options.otlp_traces_endpoint, service.names[0], clock=llm.clock)
    app.state.tracer = tracer
    app.add_exception_handler(HTTPException, _no_route)
    metrics = Book(llm, service.names[0], namespace=options.metrics_namespace)
    llm.observe(metrics)
    app.add_middleware(Guard, options=options, check_room=service.check_room)
    app.add_middleware(Watching, metrics=metrics, options=options, tracer=tracer)  # outermost: it sees what the door refuses
    _add_metrics(app, metrics)
    _add_answers(app, service)
    _add_states(app, service)
    add_views(app, service)
    add_page(app, service)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield


def _add_answers(app: FastAPI, service: Service) -> None:
    """Routes that read a body."""

    def add(path: str, body: Body, answer: Answering, *, prompt: str | None = None, may_stream: bool = False) -> None:
        async def route(request: Request) -> Any:
            parsed: dict[str, Any] = {}

            def as_error(error: BaseException) -> ApiError:
                return as_api_error(error, given=parsed, prompt=prompt)

            try:
                raw = await _raw_body(request)
                parsed = body.parse(raw) if len(raw) < _LARGE_BYTES else await service.llm.in_thread(body.parse, raw)
                asked = Asked(parsed, len(raw), request.state.tenant, request.receive, as_error)
                found = await answer(service, asked)
                return found if isinstance(found, Response) else await _json(service, found)
            except (ConnectionError, ClientDisconnect):
                raise
            except Exception as error:
                raise as_error(error) from None

        route.__doc__ = answer.__doc__
        schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": body.schema}}}}
        service.queued_paths.add(path)
        told: dict[str, Any] = {"responses": _of_kinds("application/json", *["text/event-stream"] * may_stream)}
        told |= {"name": path.strip("/"), "openapi_extra": schema}
        app.router.add_api_route(path, route, methods=["POST"], response_model=None, route_class_override=_Bare, **told)

    add("/v1/chat/completions", CHAT, chat.answer, prompt="messages", may_stream=True)
    add("/v1/completions", COMPLETION, completions.answer, prompt="prompt", may_stream=True)
    add("/v1/responses", RESPONSE, responses.answer, prompt="input", may_stream=True)
    add("/v1/embeddings", EMBEDDING, embeddings.answer, prompt="input")
    add("/tokenize", TOKENIZE, texts.tokenize, prompt="prompt")
    add("/detokenize", DETOKENIZE, texts.detokenize, prompt="tokens")


def _add_states(app: FastAPI, service: Service) -> None:
    """Routes that say how things are."""
    llm = service.llm

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return _plain({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        service.model_meant({"model": name})
        return _plain(next(one for one in service.models() if one["id"] == name))

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return _plain({"version": __version__})

    @app.get("/live", response_model=None)
    async def live() -> Response:
        """The process answers; it says nothing of the engine."""
        return _plain({"status": "live"})

    @app.get("/ping", response_model=None)
    @app.post("/ping", response_model=None)
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Whether the engine begins its steps, by its own word."""
        with _told():
            llm.check_health()
        return _plain({"status": "healthy"})

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether requests are taken: not while it drains."""
        with _told():
            llm.check_health()
        if not llm.is_ready:
            raise ApiError(503, "no further requests are taken", code="shutting_down")
        return _plain({"status": "ready"})

    @app.get("/load", response_model=None)
    async def load() -> Response:
        """How many requests have not ended."""
        return _plain(operating.load(service))

    @app.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> Response:
        """What a client that tokenises itself needs to know."""
        with _told():
            return _plain(operating.tokenizer_info(service))

    if service.options.profiler_dir is not None:

        @app.post("/start_profile", response_model=None)
        async def start_profile() -> Response:
            """Begin a trace of jax's profiler."""
            return _plain(await operating.start_profile(service))

        @app.post("/stop_profile", response_model=None)
        async def stop_profile() -> Response:
            """End it and write it."""
            return _plain(await operating.stop_profile(service))

    @app.post("/reset_prefix_cache", response_model=None)
    async def reset_prefix_cache() -> Response:
        """See `Engine.reset_prefix_cache`."""
        with _told():
            await llm.reset_prefix_cache()
        return _plain({"success": True})


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", response_model=None, responses=_of_kinds("text/plain"), response_class=Response)
    async def scrape() -> Response:
        """Prometheus' text, with vLLM's names."""
        return Response(await metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _of_kinds(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: what an answer may be."""
    return {200: {"description": "Successful Response", "content": {kind: {} for kind in kinds}}}


@contextlib.contextmanager
def _told():
    try:
        yield
    except (EngineError, RequestError) as error:
        raise as_api_error(error) from None


async def _no_route(request: Request, error: Exception) -> Response:
    """What the framework refuses itself, in our shape."""
    status = getattr(error, "status_code", 500)
    message = {404: "there is no such route", 405: "the route does not take this method"}.get(status, "the request is refused")
    told, headers = ApiError(status, message), getattr(error, "headers", None)
    if status == 405:  # of the routes of a path the framework names the methods of one
        routes = [one for one in request.app.routes if isinstance(one, Route) and one.matches(request.scope)[0] is not Match.NONE]
        headers = {"Allow": ", ".join(sorted({method for one in routes for method in one.methods or ()}))}
    return _plain(told.body, status, headers)


async def _raw_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "application/json").partition(";")
    charset = kind[2].strip().lower().replace('"', "")
    if kind[0].strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise ApiError(415, "Content-Type: expected application/json")
    pieces = []
    async for piece in request.stream():
        pieces.append(piece)
    return b"".join(pieces)


async def _json(service: Service, found: dict[str, Any]) -> Response:
    # How large it becomes is known when it has been made: long lists of tokens are what makes it so.
    is_large = sum(len(str(choice.get("text", ""))) for choice in found.get("choices", ())) > _LARGE_BYTES or any(
        choice.get("logprobs") for choice in found.get("choices", ())
    )
    content = await service.llm.in_thread(dump_json, found) if is_large else dump_json(found)
    return Response(content, media_type="application/json")


def _plain(found: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(found), status, headers, media_type="application/json")
