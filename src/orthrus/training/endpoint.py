"""Gets answers from OpenAI-compatible servers that serve the base: vLLM, SGLang, llama.cpp, Ollama, our own."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from orthrus.base.addresses import api_root
from orthrus.base.loading import Base
from orthrus.base.web_client import open_client
from orthrus.errors import MissingExtraError, ModelNotFoundError, UserInputError
from orthrus.training.answers import Answer, Question
from orthrus.training.endpoint_guard import LEAST_AGREEMENT, Agreement, agreement
from orthrus.training.endpoint_http import AGAIN, Patience, RefusedError, Requests, Server
from orthrus.training.endpoint_reply import FORMS, Form, Reader, prompt_fits, reader, request_body

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
_CHECKED_TOKENS = 64
# llama.cpp answers with this status if it does not take prompts of ids.
_CANNOT = frozenset({500})
_SECONDS = 1800.0
"""Time limit of one answer, queueing in the server included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """Settings of an `EndpointAnswerer`.

    urls: of the servers, each with or without "/v1". model: its name there; None if each server has only one.
    concurrency: number of open questions, all servers together.
    """

    urls: tuple[str, ...]
    model: str | None = None
    concurrency: int = 64
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserInputError("there is no endpoint; give the address of a server.")
        if self.concurrency < 1:
            raise UserInputError(f"the concurrency must be at least 1, not {self.concurrency}.")
        object.__setattr__(
            self, "urls", tuple(dict.fromkeys(api_root(url, "--endpoint") for url in self.urls))
        )


class EndpointAnswerer:
    """Lets servers answer. It is a context manager, because it holds connections and an event loop.

    key: the servers' API key, which is sent to them and written nowhere. transport: replaces the network, for tests.
    Each question goes to the server with the fewest open questions. Raises MissingExtraError without httpx.
    """

    def __init__(
        self,
        config: EndpointConfig,
        base: Base,
        key: str | None = None,
        transport: "httpx.AsyncBaseTransport | None" = None,
    ) -> None:
        check_installed()
        import httpx

        self._config, self._base, self._key = config, base, key
        self._reader: Reader = reader(base)
        self._servers = [Server(url) for url in config.urls]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency)
        timeout = httpx.Timeout(_SECONDS, connect=30.0)
        # The key is sent with each request, so that no other server gets it after a redirection.
        self._client = open_client(
            httpx.AsyncClient, config.urls, None, transport=transport, timeout=timeout, limits=limits
        )
        self._requests = Requests(self._client, key, config.patience)
        self._runner = asyncio.Runner()
        self._is_open = False

    def __enter__(self) -> "EndpointAnswerer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._run(self._client.aclose())
        finally:
            self._runner.close()

    @property
    def origin(self) -> str:
        return "endpoint"

    def check(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Raises UserInputError for a server whose greedy answers differ from the base's."""
        self._open(questions[0])
        most = min(_CHECKED_TOKENS, max_new_tokens)
        return [self._checked(server, questions, most) for server in self._servers]

    def __call__(self, questions: Iterable[Question], *, max_new_tokens: int) -> Iterator[Answer]:
        waiting = iter(questions)
        if not self._is_open:
            first = next(waiting, None)
            if first is None:
                return
            self._open(first)
            waiting = iter([first, *waiting])
        yield from self._answers(self._servers, waiting, max_new_tokens)

    def _answers(
        self, servers: Sequence[Server], questions: Iterable[Question], max_new_tokens: int
    ) -> Iterator[Answer]:
        waiting, loop = iter(questions), self._runner.get_loop()
        running: set[asyncio.Task[Answer]] = set()
        try:
            while True:
                for question in islice(waiting, self._config.concurrency - len(running)):
                    running.add(loop.create_task(self._answer(servers, question, max_new_tokens)))
                if not running:
                    return
                for task in self._run(_first(running)):
                    running.discard(task)
                    yield task.result()
        finally:
            self._run(_cancelled(running))

    async def _answer(self, servers: Sequence[Server], question: Question, max_new_tokens: int) -> Answer:
        def asked(server: Server) -> tuple[str, dict[str, Any]]:
            assert server.form is not None, "servers are asked once they are open"
            return server.form.path, request_body(question, server.form, server.model, max_new_tokens)

        try:
            _, reply = await self._requests.post(servers, asked)
            return self._reader.answer(reply, question, max_new_tokens)
        except RefusedError as refused:
            if refused.status in (401, 403, 404):
                raise ModelNotFoundError(
                    f"a server does not answer any more ({refused}); what is done is kept: see to it, and run "
                    "the same command again."
                ) from None
            return Answer(question.key, [], False, "refused by the server")
        except ValueError:
            return Answer(question.key, [], False, "a reply that is no answer")

    def _checked(self, server: Server, questions: Sequence[Question], most: int) -> dict[str, Any]:
        prompts = {question.key: question.prompt_ids for question in questions}
        answers = list(self._answers([server], questions, most))
        kept = [(prompts[a.key], a.token_ids) for a in answers if a.token_ids]
        if not kept:
            why = Counter(a.left_out for a in answers).most_common(1)[0][0]
            raise UserInputError(
                f"{server.url} gives no answer that could be read as tokens of {self._base.name} ({why}); "
                "serve that model there."
            )
        # Outside of a pass, the model with twins computes what the base computes.
        found = agreement(self._base.model, kept)
        if not found.holds:
            raise UserInputError(_wrong_model(server, self._base, found))
        guard = {
            "answers": len(kept),
            "tokens": found.tokens,
            "agreeing": round(found.share, 4),
            "mean_log_prob": round(found.mean_log_prob, 4),
        }
        about = {"url": server.url, "model": server.model, "version": server.version}
        return about | {"form": str(server.form), "guard": guard}

    def _open(self, question: Question) -> None:
        """Ask each server for its model and version, and find the form of request that it takes."""
        if not self._is_open:
            for server in self._servers:
                self._run(self._met(server, question))
            self._is_open = True

    async def _met(self, server: Server, question: Question) -> None:
        try:
            server.model = self._config.model or _only_model(
                server, await self._requests.get(server, f"{server.url}/models")
            )
            server.version = await self._version(server)
            server.form = await self._form(server, question)
        except RefusedError as refused:
            key = "set ORTHRUS_API_KEY or OPENAI_API_KEY to its key" if self._key is None else "check the key"
            cause = key if refused.status in (401, 403) else "check its address and the model's name"
            raise ModelNotFoundError(f"{server.url} refuses requests ({refused}); {cause}.") from None

    async def _version(self, server: Server) -> str | None:
        """The server's version. vLLM, llama.cpp and Ollama have different paths for it."""
        root = server.url.rpartition("/")[0]
        for page, name in (("/version", "version"), ("/api/version", "version"), ("/props", "build_info")):
            try:
                content = await self._requests.get(server, root + page, final=AGAIN)
            except RefusedError:
                continue
            if isinstance(content, dict) and isinstance(content.get(name), str):
                return str(content[name])[:100]
        return None

    async def _form(self, server: Server, question: Question) -> Form:
        """The first form that the server takes. Raises the last refusal if there is none."""
        refused: Exception | None = None
        for form in FORMS:
            if not form.ids and question.texts is None:
                break
            body = request_body(question, form, server.model, 1)
            try:
                _, reply = await self._requests.post(
                    [server], partial(_same, (form.path, body)), final=_CANNOT
                )
                self._reader.answer(reply, question, 1)
            except RefusedError as error:
                if error.status in (401, 403):
                    raise
                refused = error
                continue
            except ValueError as error:
                refused = RefusedError(200, str(error))
                continue
            # A server that misreads the ids counts another number of tokens.
            if not form.ids or prompt_fits(reply, question):
                return form
            refused = RefusedError(200, "it reads token ids as something else")
        raise refused or RefusedError(200, "it takes no prompts as token ids")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)


def _same(request: tuple[str, Any], _: Server) -> tuple[str, Any]:
    return request


def check_installed() -> None:
    """Raises MissingExtraError without httpx."""
    try:
        import httpx  # noqa: F401
    except ImportError as e:
        raise MissingExtraError(
            'answers from servers need the package httpx; run `pip install "orthrus-lm[train]"`.'
        ) from e


async def _first(running: "set[asyncio.Task[Answer]]") -> "set[asyncio.Task[Answer]]":
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    return done


async def _cancelled(running: "set[asyncio.Task[Answer]]") -> None:
    for task in running:
        task.cancel()
    # Their errors are collected too, so that the loop does not report them.
    await asyncio.gather(*running, return_exceptions=True)


def _only_model(server: Server, listed: Any) -> str:
    data = listed.get("data") if isinstance(listed, dict) else None
    cards = data if isinstance(data, list) else []
    names = [str(card["id"]) for card in cards if isinstance(card, dict) and card.get("id")]
    if len(names) == 1:
        return names[0]
    shown = ", ".join(names[:8])
    raise UserInputError(
        f"{server.url} serves {len(names)} models ({shown}); name one with --endpoint-model."
        if names
        else f"{server.url} lists no model; name it with --endpoint-model, and check the address."
    )


def _wrong_model(server: Server, base: Base, found: Agreement) -> str:
    template = "" if server.form is not None and server.form.ids else ", chat template"
    return (
        f"{server.url} serves another model than {base.name}: only {found.share:.0%} of {found.tokens} tokens of its "
        f"greedy answers are what {base.name} would have written, and {LEAST_AGREEMENT:.0%} is the least; serve the "
        f"same weights{template} and no sampling settings of its own there."
    )
