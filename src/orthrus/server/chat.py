"""/v1/chat/completions and /v1/completions: from a request to its answer, whole or as it comes."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orthrus.errors import UserInputError
from orthrus.server.calls import Call, Job
from orthrus.server.errors import as_api_error
from orthrus.server.figures import Told, metrics, provenance, usage
from orthrus.server.guard import CLIENT_GONE
from orthrus.server.origin import Origin
from orthrus.server.params import base_seed, check_together, decode_configs, named
from orthrus.server.prompts import chat_ids, prompts_of, room_behind, text_ids
from orthrus.server.receipts import Receipts
from orthrus.server.schemas import ChatRequest, CompletionRequest
from orthrus.server.service import Live, Service
from orthrus.server.shapes import ChatShape, Head, TextShape
from orthrus.server.sse import DONE, EventStream, event, whole
from orthrus.server.tokens import TokenBytes

Body = ChatRequest | CompletionRequest


@dataclass(slots=True)
class Answer:
    """One request and all that its answer is made of."""

    call: Call
    head: Head
    shape: ChatShape | TextShape
    texts: list[Told]
    num_prompts: int
    seed: int
    include_usage: bool
    prompt_ids: list[int] | None
    token_bytes: TokenBytes | None
    receipts: Receipts | None

    def metrics(self) -> dict[str, Any]:
        """Of all texts, once they have ended."""
        found = metrics(self.texts, self.seed)
        if self.receipts is not None:
            found["orthrus"]["receipt"] = self.receipts(self.call)
        return found

    def take_cached(self) -> None:
        """What of the prompts had been in the cache is known once they have been read."""
        for told, request in zip(self.texts, self.call.requests, strict=True):
            told.num_cached = 0 if request is None else request.num_cached


async def respond(service: Service, request: Request, body: Body) -> Response:
    """Answer a chat or completion request. Raises ApiError and OrthrusError before the first byte."""
    live = service.live
    live.check_model(body.model)
    service.unknown.check(body)
    check_together(body)
    num_prompts = 1 if isinstance(body, ChatRequest) else len(prompts_of(body.prompt))
    call = live.loop.admit(num_prompts * body.n)
    call.origin = Origin.of(request, body)
    seed = base_seed(body)
    handing_in = live.loop.submit(call, partial(_jobs, live, body, seed))
    streams = False
    try:
        jobs = await whole(request, handing_in)
        if jobs is None:
            return Response(status_code=CLIENT_GONE)
        answer = _answer(live, request, body, call, jobs, seed)
        if body.stream:
            streams = True
            return EventStream(_events(answer), call.cancel, keepalive=service.config.keepalive)
        got = await whole(request, _collect(answer))
        return Response(status_code=CLIENT_GONE) if got is None else got
    except UserInputError as error:
        raise named(error) from error
    finally:
        # A stream does it when it ends.
        if not streams and not call.ended:
            call.cancel()


def _jobs(live: Live, body: Body, seed: int) -> list[Job]:
    """The texts to be written, prompt by prompt; runs beside the event loop."""
    context = live.orthrus.engine.context_length
    if isinstance(body, ChatRequest):
        prompts = [chat_ids(live.orthrus, body.messages, body.chat_template_kwargs)]
    else:
        prompts = [text_ids(live.orthrus, prompt) for prompt in prompts_of(body.prompt)]
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    jobs = []
    for ids in prompts:
        room = min(room_behind(ids, context, param), live.config.max_tokens or context)
        jobs += [Job(ids, config) for config in decode_configs(body, seed, room)]
    return jobs


def _answer(live: Live, request: Request, body: Body, call: Call, jobs: list[Job], seed: int) -> Answer:
    is_chat = isinstance(body, ChatRequest)
    prefix = "chatcmpl" if is_chat else "cmpl"
    head = Head(
        f"{prefix}-{request.state.request_id}", int(time()), body.model or live.name, live.fingerprint
    )
    with_provenance = body.orthrus is not None and body.orthrus.provenance
    # Records of tokens without text are sent only where their ids are.
    with_ids = bool(body.return_token_ids) or with_provenance
    shape: ChatShape | TextShape
    if isinstance(body, ChatRequest):
        shape = ChatShape(live.token_bytes, token_ids=with_ids)
    else:
        prompts = prompts_of(body.prompt)
        echoes = [_echo(live, body, prompts[i // body.n]) for i in range(len(jobs))]
        shape = TextShape(live.token_bytes, echoes, [job.prompt_ids for job in jobs], token_ids=with_ids)
    return Answer(
        call=call,
        head=head,
        shape=shape,
        texts=[Told(len(job.prompt_ids), job.config.strategy) for job in jobs],
        num_prompts=len(jobs) // body.n,
        seed=seed,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        prompt_ids=jobs[0].prompt_ids if with_ids and is_chat else None,
        token_bytes=live.token_bytes if with_provenance else None,
        receipts=live.receipts if body.orthrus is not None and body.orthrus.receipt else None,
    )


def _echo(live: Live, body: CompletionRequest, prompt: str | list[int]) -> str:
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    return str(live.orthrus.base.tokenizer.decode(prompt))


async def _collect(answer: Answer) -> Response:
    async for index, cycle in answer.call:
        answer.texts[index].cycles.append(cycle)
    answer.take_cached()
    shape, texts = answer.shape, answer.texts
    choices = [shape.whole(index, told) for index, told in enumerate(texts)]
    body = answer.head.body(shape.whole_kind, choices)
    body |= {"usage": usage(texts, answer.num_prompts), "metrics": answer.metrics()}
    if answer.prompt_ids is not None:
        body["prompt_token_ids"] = answer.prompt_ids
    return JSONResponse(body)


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    """The events of a stream. What goes wrong from here on is an event too, since the status has been sent."""
    call, shape, texts = answer.call, answer.shape, answer.texts
    no_usage = {"usage": None} if answer.include_usage else {}

    def chunk(choice: dict[str, object]) -> dict[str, object]:
        return answer.head.body(shape.chunk_kind, [choice]) | no_usage

    try:
        for index in range(len(texts)):
            first = shape.first(index)
            if first is not None:
                body = chunk(first)
                if answer.prompt_ids is not None and index == 0:
                    body["prompt_token_ids"] = answer.prompt_ids
                yield event(body)
        num_left = len(texts)
        async for index, cycle in call:
            texts[index].cycles.append(cycle)
            piece = shape.chunk(index, cycle)
            if piece is not None:
                if answer.token_bytes is not None:
                    piece["orthrus"] = provenance(cycle, answer.token_bytes)
                yield event(chunk(piece))
            if _is_end(texts[index]):
                num_left -= 1
                answer.take_cached()
                body = chunk(shape.last(index, cycle.finish_reason))
                if num_left == 0 and not answer.include_usage:
                    body["metrics"] = answer.metrics()
                yield event(body)
        if answer.include_usage:
            body = answer.head.body(shape.chunk_kind, [])
            yield event(body | {"usage": usage(texts, answer.num_prompts), "metrics": answer.metrics()})
    except Exception as error:
        yield event(as_api_error(error).body)
    yield DONE


def _is_end(told: Told) -> bool:
    """Whether the last record ends a text; what was cancelled or never began fails instead."""
    finish = told.finish
    return finish in ("stop", "length") or (finish == "deadline" and told.num_tokens > 0)
