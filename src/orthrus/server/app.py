"""The application: routes over a `Service`, behind the guard."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from orthrus import __version__
from orthrus.api import Orthrus
from orthrus.errors import OrthrusError
from orthrus.server.answers import respond_chat, respond_message, respond_response, respond_text
from orthrus.server.audit_routes import add_audit
from orthrus.server.errors import ApiError, as_api_error, bad_request, refused_place, wrong_field
from orthrus.server.guard import CLIENT_GONE, Guard
from orthrus.server.messages import CountTokensRequest, MessageRequest, as_chat
from orthrus.server.page import page
from orthrus.server.params import DEFAULT_COMPLETION_TOKENS, DEFAULT_TEMPERATURE
from orthrus.server.prompts import chat_ids, text_ids
from orthrus.server.responses import ResponseRequest
from orthrus.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from orthrus.server.service import Live, Service
from orthrus.server.settings import ServeConfig

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "A field is wrong; the error names it."),
        (401, "An API key is needed."),
        (403, "Pages of that origin may not use the server."),
        (404, "Not served here."),
        (405, "The method is not allowed."),
        (408, "The answer was not read."),
        (413, "The body is too large."),
        (429, "All places are taken; see Retry-After."),
        (500, "The model or the server failed."),
        (503, "Loading, draining or shutting down; see Retry-After."),
        (504, "The request took too long."),
    )
}


_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The document without FastAPI's 422 responses: the server answers invalid requests with 400."""
        document = super().openapi()
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        return document


def create_app(load: Callable[[], Orthrus], config: ServeConfig | None = None) -> FastAPI:
    """An ASGI application that loads its model with `load` and serves it. `app.state.service` holds its state."""
    config = config or ServeConfig()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = _App(
        title="Orthrus",
        version=__version__,
        lifespan=lifespan,
        # FastAPI's own pages load scripts from other sites.
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    service = Service(load, config)
    app.state.service = service
    for kind in (ApiError, OrthrusError):
        app.add_exception_handler(kind, _foreseen)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    _add_answers(app, service)
    _add_state(app, service)
    add_audit(app, service)
    if config.page:
        app.add_api_route("/", page, methods=["GET"], response_model=None, include_in_schema=False)
    app.add_middleware(
        Guard,
        config=config,
        on_response=lambda status: service.metrics.responses.labels(str(status)).inc(),
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            # Official clients send some dozen headers of their own. Origins are what is restricted.
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses=_STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await respond_chat(service, request, body)

    @app.post("/v1/completions", response_model=None, responses=_STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await respond_text(service, request, body)

    @app.post("/v1/responses", response_model=None, responses=_STREAMED)
    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Answer in OpenAI's newer API (Responses)."""
        return await respond_response(service, request, body)

    @app.post("/v1/messages", response_model=None, responses=_STREAMED)
    async def messages(body: MessageRequest, request: Request) -> Response:
        """Answer in Anthropic's API (Messages)."""
        return await respond_message(service, request, body)

    @app.post("/v1/messages/count_tokens", response_model=None)
    def count_tokens(body: CountTokensRequest) -> Response:
        """Count the tokens of a prompt in Anthropic's API."""
        live = service.live
        live.check_model(body.model)
        asked = as_chat(body)
        ids = chat_ids(live.orthrus, asked.messages, asked.tools, None)
        return JSONResponse({"input_tokens": len(ids)})

    @app.post("/tokenize", response_model=None)
    def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of `prompt` (as in vLLM), of `content` (as in llama.cpp), or of `messages`."""
        live = service.live
        live.check_model(body.model)
        given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise bad_request("Give one of prompt, content and messages.", param="prompt")
        ids = _tokens(live, body)
        return JSONResponse(
            {"count": len(ids), "tokens": ids, "max_model_len": live.orthrus.engine.context_length}
        )

    @app.post("/detokenize", response_model=None)
    def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        live = service.live
        live.check_model(body.model)
        if beyond := [i for i in body.tokens if i >= live.orthrus.dual.vocab_size]:
            raise bad_request(f"tokens: the model has no token {beyond[0]}.", param="tokens")
        text = str(live.orthrus.base.tokenizer.decode(body.tokens))
        return JSONResponse({"prompt": text, "content": text})


def _tokens(live: Live, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return chat_ids(live.orthrus, body.messages, body.tools, body.chat_template_kwargs)
    text = body.content if body.prompt is None else body.prompt
    if not text:
        return []
    # By default vLLM adds special tokens, and llama.cpp does not.
    wanted = body.add_special if body.prompt is None else body.add_special_tokens
    if wanted if wanted is not None else body.prompt is not None:
        return text_ids(live.orthrus, text) if text.strip() else _plain_ids(live, text)
    return _plain_ids(live, text)


def _plain_ids(live: Live, text: str) -> list[int]:
    tokenizer: Any = live.orthrus.base.tokenizer
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [_card(service.live)]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        """The model of that name."""
        service.live.check_model(name)
        return JSONResponse(_card(service.live))

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Whether the server process runs."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether the server accepts requests. It does not while the model is loading or the server is draining."""
        return JSONResponse({"status": "ready", "model": service.ready.name})

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse)
    def metrics() -> Response:
        """Metrics in the Prometheus format."""
        return Response(service.metrics.page(), media_type="text/plain; version=1.0.0; charset=utf-8")


def _card(live: Live) -> dict[str, Any]:
    return {
        "id": live.name,
        "object": "model",
        "created": live.created,
        "owned_by": "orthrus",
        "root": live.name,
        "parent": None,
        "max_model_len": live.orthrus.engine.context_length,
        "orthrus": {
            "default_temperature": DEFAULT_TEMPERATURE,
            "default_completion_tokens": DEFAULT_COMPLETION_TOKENS,
            "max_tokens": live.config.max_tokens,
            "view": live.orthrus.describe()["view"],
        },
    }


def _response(request: Request, error: ApiError) -> Response:
    return Response(error.payload(request.url.path), status_code=error.status, headers=error.headers)


async def _foreseen(request: Request, error: Exception) -> Response:
    return _response(request, as_api_error(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):
        # Nobody reads this, but it is counted and logged.
        return Response(status_code=CLIENT_GONE)
    if error.status_code == 404:
        answer = ApiError(
            404,
            f"There is nothing at {ascii(request.url.path)[:200]}: GET /openapi.json lists the paths.",
            code="not_found",
        )
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        answer = ApiError(
            405,
            f"{ascii(request.method)[1:-1][:20]} is not allowed here: use {allowed}.",
            code="method_not_allowed",
            allow=allowed,
        )
    elif isinstance(error.__cause__, RecursionError):
        answer = bad_request("The body is nested too deeply: use fewer levels.", code="invalid_json")
    elif error.status_code == 400:
        answer = bad_request("The body cannot be read: send one JSON object in UTF-8.", code="invalid_json")
    else:
        answer = ApiError(error.status_code, str(error.detail))
    return _response(request, answer)


async def _invalid(request: Request, error: Exception) -> Response:
    """An error for the first wrong field, without its value."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        answer = bad_request(
            f"The body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1] + 1}; correct "
            "it there.",
            code="invalid_json",
        )
        return _response(request, answer)
    if not place and not refused_place(first):
        if "application/json" not in request.headers.get("content-type", ""):
            return _response(
                request, bad_request("Send JSON, with the header 'Content-Type: application/json'.")
            )
        return _response(request, bad_request("The body must be a JSON object."))
    return _response(request, wrong_field(place, first))
