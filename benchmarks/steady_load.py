"""Greedy requests at a steady rate, and what their clients saw: for two_servers.py."""

import asyncio
import json
import time
from dataclasses import dataclass, field

import httpx

from orthrus.base.event_stream import EventData

PATIENCE = 120.0


@dataclass
class Asked:
    """One request and what its client saw. Seconds are of the monotonic clock."""

    number: int
    is_stream: bool
    sent: float
    outcome: str = "no answer"
    said: str = ""
    token_ids: list[int] = field(default_factory=list)
    ended: float = 0.0
    again: "Asked | None" = None


class Load:
    """Requests at a steady rate, each with a client's patience. plain: what the stock model makes of each prompt."""

    def __init__(self, url: str, prompts: list[str], plain: list[list[int]], num_tokens: int) -> None:
        self.url, self.prompts, self.plain, self.num_tokens = (
            f"{url}/v1/completions",
            prompts,
            plain,
            num_tokens,
        )
        self.asked: list[Asked] = []
        self.is_over = asyncio.Event()

    async def run(self, rate: float) -> None:
        """Until `is_over` is set and everything asked is through."""
        start, tasks = time.monotonic(), []
        # A connection for each request, as many clients have it, and no retry that we would not see.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=PATIENCE, limits=limits, trust_env=False) as client:
            while not self.is_over.is_set():
                tasks.append(asyncio.create_task(self.one(client, len(tasks))))
                await asyncio.sleep(max(0.0, start + len(tasks) / rate - time.monotonic()))
            await asyncio.gather(*tasks)

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        # In pairs of one kind: a router that takes turns among two servers gives both kinds to both.
        asked = Asked(number, is_stream=number % 4 in (1, 2), sent=time.monotonic())
        self.asked.append(asked)
        await self.ask(client, asked)
        if asked.outcome != "whole":
            await asyncio.sleep(1.0)
            asked.again = Asked(number, asked.is_stream, sent=time.monotonic())
            await self.ask(client, asked.again)

    async def ask(self, client: httpx.AsyncClient, asked: Asked) -> None:
        """Send it and note what became of it."""
        body = {
            "model": "served",
            "prompt": self.prompts[asked.number % len(self.prompts)],
            "max_tokens": self.num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": asked.is_stream,
        }
        try:
            async with (
                asyncio.timeout(PATIENCE),
                client.stream("POST", self.url, json=body) as response,
            ):
                asked.outcome = "cut" if response.status_code == 200 else str(response.status_code)
                if response.status_code == 200 and asked.is_stream:
                    await read_stream(response, asked)
                else:
                    await response.aread()
                    if response.status_code == 200:
                        asked.token_ids = response.json()["choices"][0]["token_ids"]
                        asked.outcome = "whole"
                    else:
                        asked.said = response.text
        except TimeoutError:
            asked.outcome = "late"
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            asked.said = f"{type(error).__name__}: {error}"
        asked.ended = time.monotonic()

    def expected(self, asked: Asked) -> list[int]:
        return self.plain[asked.number % len(self.plain)]


async def read_stream(response: httpx.Response, asked: Asked) -> None:
    """Token ids as they come; a stream that has no [DONE] stays "cut"."""
    reader = EventData()
    async for piece in response.aiter_text():
        for data in reader.feed(piece):
            if data == "[DONE]":
                asked.outcome = "whole" if asked.outcome == "cut" else asked.outcome
                continue
            event = json.loads(data)
            if "error" in event:
                asked.outcome, asked.said = "event", data
            for choice in event.get("choices", ()):
                asked.token_ids += choice.get("token_ids") or ()
