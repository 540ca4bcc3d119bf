"""Answers requests of all APIs, whole or as a stream."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from time import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orthrus.errors import UserInputError
from orthrus.server import messages, responses
from orthrus.server.calls import Call, Job
from orthrus.server.errors import as_api_error
from orthrus.server.figures import TextRecords
from orthrus.server.guard import CLIENT_GONE
from orthrus.server.messages import MessageRequest
from orthrus.server.messages_shape import MessagesShape
from orthrus.server.origin import Origin
from orthrus.server.params import base_seed, check_together, decode_configs, named
from orthrus.server.prompts import chat_ids, prompts_of, room_behind, text_ids
from orthrus.server.responses import ResponseRequest
from orthrus.server.responses_shape import ResponsesShape
from orthrus.server.schemas import ChatRequest, CompletionRequest
from orthrus.server.service import Live, Service
from orthrus.server.shapes import About, ChatShape, Shape, TextShape
from orthrus.server.sse import EventStream, whole
from orthrus.server.tools import calling

Body = ChatRequest | CompletionRequest
Shaping = Callable[[About], Shape]


async def respond_chat(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answer a chat. Raises as `respond` does."""
    shaping = partial(ChatShape, include_usage=_include_usage(body))
    return await respond(service, request, body, "chatcmpl-", shaping)


async def respond_text(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Answer a completion. Raises as `respond` does."""

    def shape(about: About) -> Shape:
        prompts = prompts_of(body.prompt)
        echoes = [_echo(service.live, body, prompts[i // body.n]) for i in range(len(about.texts))]
        return TextShape(about, include_usage=_include_usage(body), echoes=echoes)

    return await respond(service, request, body, "cmpl-", shape)


async def respond_response(service: Service, request: Request, body: ResponseRequest) -> Response:
    """Answer a request of /v1/responses. Raises as `respond` does."""
    service.unknown.check(body)
    return await respond(
        service, request, responses.as_chat(body), "resp_", partial(ResponsesShape, body=body)
    )


async def respond_message(service: Service, request: Request, body: MessageRequest) -> Response:
    """Answer a request of /v1/messages. Raises as `respond` does."""
    service.unknown.check(body)
    return await respond(service, request, messages.as_chat(body), "msg_", MessagesShape)


async def respond(service: Service, request: Request, body: Body, prefix: str, shaping: Shaping) -> Response:
    """Answer a request. prefix: the first part of the answer's id.

    Raises ApiError and OrthrusError before the first byte.
    """
    has_calls = isinstance(body, ChatRequest) and calling(body) is not None
    live = service.live
    live.check_model(body.model)
    service.unknown.check(body)
    check_together(body)
    num_prompts = 1 if isinstance(body, ChatRequest) else len(prompts_of(body.prompt))
    call = live.loop.admit(num_prompts * body.n)
    call.origin = Origin.of(request, body)
    seed = base_seed(body)
    submitting = live.loop.submit(call, partial(_jobs, live, body, seed))
    streams = False
    try:
        jobs = await whole(request, submitting)
        if not jobs:
            if call.failure is not None:
                # The server shut down before any request was submitted.
                raise as_api_error(call.failure)
            return Response(status_code=CLIENT_GONE)
        about = _about(live, body, prefix, request.state.request_id, jobs, seed, has_calls)
        if body.orthrus is not None and body.orthrus.receipt:
            about.receipt = partial(live.receipts, call)
        shape = shaping(about)
        if body.stream:
            streams = True
            events = _events(call, about.texts, shape)
            return EventStream(events, call.cancel, keepalive=service.config.keepalive)
        got = await whole(request, _collect(call, about.texts, shape))
        return Response(status_code=CLIENT_GONE) if got is None else got
    except UserInputError as error:
        raise named(error) from error
    finally:
        # A stream cancels the call itself when it ends.
        if not streams and not call.ended:
            call.cancel()


def _jobs(live: Live, body: Body, seed: int) -> list[Job]:
    """The texts to write, prompt by prompt. Runs in another thread than the event loop."""
    context = live.orthrus.engine.context_length
    if isinstance(body, ChatRequest):
        prompts = [chat_ids(live.orthrus, body.messages, body.tools, body.chat_template_kwargs)]
    else:
        prompts = [text_ids(live.orthrus, prompt) for prompt in prompts_of(body.prompt)]
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    jobs = []
    for number, ids in enumerate(prompts):
        room = min(room_behind(ids, context, param), live.config.max_tokens or context)
        jobs += [Job(ids, config) for config in decode_configs(body, seed, room, number)]
    return jobs


def _about(
    live: Live, body: Body, prefix: str, key: str, jobs: list[Job], seed: int, has_calls: bool
) -> About:
    with_provenance = body.orthrus is not None and body.orthrus.provenance
    return About(
        prefix=prefix,
        key=key,
        created=int(time()),
        model=body.model or live.name,
        fingerprint=live.fingerprint,
        texts=[TextRecords(len(job.prompt_ids), job.config.strategy) for job in jobs],
        num_prompts=len(jobs) // body.n,
        seed=seed,
        bytes=live.token_bytes,
        # A record without text is sent only if ids are.
        token_ids=bool(body.return_token_ids) or with_provenance,
        provenance=with_provenance,
        has_calls=has_calls,
        prompts=[job.prompt_ids for job in jobs],
    )


def _include_usage(body: Body) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _echo(live: Live, body: CompletionRequest, prompt: str | list[int]) -> str:
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    return str(live.orthrus.base.tokenizer.decode(prompt))


async def _collect(call: Call, texts: list[TextRecords], shape: Shape) -> Response:
    async for index, cycle in call:
        texts[index].cycles.append(cycle)
    _take_ends(call, texts)
    return JSONResponse(shape.whole())


async def _events(call: Call, texts: list[TextRecords], shape: Shape) -> AsyncIterator[bytes]:
    """The events of a stream. An error becomes an event, because the status has been sent."""
    try:
        for piece in shape.begin():
            yield piece
        async for index, cycle in call:
            texts[index].cycles.append(cycle)
            for piece in shape.add(index, cycle):
                yield piece
            if _is_end(texts[index]):
                _take_ends(call, texts)
                for piece in shape.end(index):
                    yield piece
    except Exception as error:
        for piece in shape.failed(as_api_error(error)):
            yield piece
    for piece in shape.close():
        yield piece


def _take_ends(call: Call, texts: list[TextRecords]) -> None:
    """Copy from the finished requests what their records do not hold."""
    for records, request in zip(texts, call.requests, strict=True):
        if request is not None:
            records.num_cached = request.num_cached
            records.stop_string = request.text.stop_string


def _is_end(records: TextRecords) -> bool:
    """Whether the last record ends a text. A text that was cancelled, or never began, fails instead."""
    finish = records.finish
    return finish in ("stop", "length") or (finish == "deadline" and records.num_tokens > 0)
