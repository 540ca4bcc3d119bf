"""Put a running server under load: closed loops and random arrivals, several arms, every answer checked."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from orthrus.base.addresses import api_root
from orthrus.base.web_client import open_client
from orthrus.bench.arms import check_rounds
from orthrus.bench.load_client import Ask, LoadClient, served_model
from orthrus.bench.load_report import LoadReport, load_report
from orthrus.bench.load_runs import Level, Run, check, run_once, salted
from orthrus.errors import UserInputError

SETTLE_S = 0.1
PROBE_TOKENS = 4

OnProgress = Callable[[str, int, int], None]
"""Called with (what is running, requests done, requests in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to measure, and where.

    asks: the requests of each run, in this order; request i has seed + i. strategies: the arms, values of our
    field `orthrus.strategy`; None sends no such field, for servers that do not know it. Arms get the same requests
    at the same times and take turns at going first. salt: begin the prompts of each run with its name, so that no
    run finds in the server's cache what another one left there. check: compare the token ids of every answer with
    those of the same request alone, decoded plainly. ttft_limit_ms, tpot_limit_ms: what a good answer keeps to.
    timeout: seconds for an answer.
    """

    url: str
    asks: Sequence[Ask]
    levels: Sequence[Level]
    strategies: Sequence[str | None] = (None,)
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    seed: int = 0
    repeats: int = 1
    warmup: int = 2
    ignore_eos: bool = False
    salt: bool = True
    check: bool = True
    ttft_limit_ms: float | None = None
    tpot_limit_ms: float | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("asks", "levels", "strategies"):
            if not getattr(self, name):
                raise UserInputError(f"there is nothing to measure: {name} is empty; give at least one.")
        check_rounds(self.repeats, self.warmup, levels=self.levels, strategies=self.strategies)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without prompts and key."""
        names = ("temperature", "seed", "repeats", "warmup", "ignore_eos", "salt", "timeout")
        limits = ("ttft_limit_ms", "tpot_limit_ms")
        return {name: getattr(self, name) for name in names + limits} | {
            "num_requests": len(self.asks),
            "levels": [str(level) for level in self.levels],
            "strategies": list(self.strategies),
            "max_tokens": sorted({ask.max_tokens for ask in self.asks}),
        }


@dataclass(frozen=True, slots=True)
class _Server:
    """The properties of the servers that their first answers show."""

    url: str
    has_ids: bool
    is_orthrus: bool


def run_load(
    options: LoadOptions,
    on_progress: OnProgress = lambda stage, done, total: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> LoadReport:
    """Measure all levels and arms. transport: how to reach the server, for tests.

    Blocks, in an event loop of its own. Raises UserInputError where the server does not answer as it must.
    """
    return asyncio.run(_run_load(options, on_progress, transport))


async def _run_load(
    options: LoadOptions, on_progress: OnProgress, transport: httpx.AsyncBaseTransport | None
) -> LoadReport:
    url = api_root(options.url, "--url")
    async with _http(options, url, transport) as http:
        card = await served_model(http, url) if options.model is None else {"id": options.model}
        client = LoadClient(
            http,
            str(card.get("id")),
            temperature=options.temperature,
            ignore_eos=options.ignore_eos,
            timeout=options.timeout,
        )
        server = await _probe(client, options, url)
        runs = await _all_runs(client, options, on_progress)
        if options.check and server.has_ids:
            total = sum(len(run.answers) for run in runs)
            await check(
                client,
                runs,
                "ar" if server.is_orthrus else None,
                greedy=options.temperature == 0.0,
                on_done=lambda done: on_progress("the same requests, alone", done, total),
            )
    about = {
        "url": url,
        "model": client.model,
        "max_model_len": card.get("max_model_len"),
        "is_orthrus": server.is_orthrus,
    }
    settings = options.to_dict() | {"check": _what_is_checked(options, server)}
    return load_report(runs, about, settings, secret=options.api_key)


def _http(options: LoadOptions, url: str, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    return open_client(
        httpx.AsyncClient,
        [url],
        options.api_key,
        base_url=url,
        # Servers close what has been idle for some seconds; a request on such a connection would fail.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        # The client bounds each answer as a whole.
        timeout=None,
        transport=transport,
    )


async def _probe(client: LoadClient, options: LoadOptions, url: str) -> _Server:
    """A first answer of each arm. Raises UserInputError where nothing can be measured."""
    short = replace(options.asks[0], max_tokens=min(PROBE_TOKENS, options.asks[0].max_tokens))
    has_ids = is_orthrus = True
    for strategy in options.strategies:
        answer = await client.answer(short, options.seed, strategy)
        if client.token_ids and (answer.reason or "").startswith(("400", "422")):
            # Some servers refuse fields that they do not know.
            client.token_ids = False
            answer = await client.answer(short, options.seed, strategy)
        if answer.status != "ok":
            raise UserInputError(
                f"the server at {url} did not answer a first request ({answer.reason}); look into its log."
            )
        if strategy is not None and answer.strategy != strategy:
            raise UserInputError(
                f"the server at {url} does not know our strategies; leave out --strategy, or give the address of "
                "`orthrus serve`."
            )
        if answer.num_tokens is None:
            raise UserInputError(
                f"the server at {url} does not count its tokens (stream_options.include_usage), so that nothing can "
                "be measured; use a newer release of it."
            )
        has_ids = has_ids and answer.token_ids is not None
        is_orthrus = is_orthrus and answer.strategy is not None
    return _Server(url, has_ids, is_orthrus)


def _what_is_checked(options: LoadOptions, server: _Server) -> str:
    if not options.check:
        return "off"
    if not server.has_ids:
        return "off, because the server does not return token ids (return_token_ids)"
    how = "decoded plainly (strategy ar), " if server.is_orthrus else ""
    return f"token ids against those of the same request, {how}alone"


async def _all_runs(client: LoadClient, options: LoadOptions, on_progress: OnProgress) -> list[Run]:
    """Each level with each arm, repeat by repeat."""
    arms, total = list(options.strategies), len(options.asks)
    if options.warmup:
        asks = [options.asks[i % total] for i in range(options.warmup)]
        for arm in arms:
            await run_once(client, asks, Level(len(asks)), arm=arm, repeat=-1, seed=options.seed)
    runs: list[Run] = []
    for repeat in range(options.repeats):
        for place, level in enumerate(options.levels):
            shift = (repeat + place) % len(arms)
            for arm in arms[shift:] + arms[:shift]:
                asks = list(options.asks)
                if options.salt:
                    asks = [salted(ask, options.seed, len(runs) + 1) for ask in asks]
                stage = f"{level}, {arm or 'all'}, repeat {repeat + 1} of {options.repeats}"

                def on_done(done: int, stage: str = stage) -> None:
                    on_progress(stage, done, total)

                await asyncio.sleep(SETTLE_S)
                runs.append(
                    await run_once(
                        client, asks, level, arm=arm, repeat=repeat, seed=options.seed, on_done=on_done
                    )
                )
    return runs
