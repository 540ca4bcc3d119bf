"""Other programs' servers as arms: llama.cpp's by its own interface, vLLM's and others by OpenAI's.

Prompts go as token ids and answers come back as such, so that nobody tokenises otherwise. Times hold the HTTP
request, about a millisecond.
"""

import time
from dataclasses import dataclass
from typing import Any

import httpx
import typer
from arms import Answer, Arm

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where a server completes token ids, and how it is asked to return them."""

    path: str
    most: str
    wish: dict[str, Any]

    def body(self, prompt_ids: list[int], num_new: int, model: str | None) -> dict[str, Any]:
        """A greedy request for so many tokens, whatever ends a text."""
        body = {"prompt": prompt_ids, self.most: num_new, "temperature": 0, "ignore_eos": True, **self.wish}
        return body if model is None else {**body, "model": model}

    def token_ids(self, reply: dict[str, Any]) -> list[int]:
        found = reply["tokens"] if "tokens" in reply else reply["choices"][0]["token_ids"]
        return [int(i) for i in found]


LLAMA_CPP = Dialect("/completion", "n_predict", {"return_tokens": True, "cache_prompt": False})
OPENAI = Dialect("/v1/completions", "max_tokens", {"return_token_ids": True})


def server(named: str, transport: httpx.BaseTransport | None = None) -> tuple[str, Arm]:
    """(name, arm) of NAME=URL, a server that runs already. transport: in place of the network.

    Raises typer.BadParameter where it cannot be used, as does the arm.
    """
    name, _, url = named.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{named!r} is not of the form NAME=URL, such as vllm=http://127.0.0.1:8000")
    client = httpx.Client(base_url=url, timeout=TIMEOUT_S, transport=transport)
    try:
        # Only llama.cpp has /props.
        is_llama = client.get("/props").status_code == httpx.codes.OK
        model = None if is_llama else client.get("/v1/models").json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise typer.BadParameter(f"{url} does not answer as a model's server: {error!r}") from error
    dialect = LLAMA_CPP if is_llama else OPENAI

    def run(prompt_ids: list[int], num_new: int) -> Answer:
        start = time.perf_counter()
        reply = client.post(dialect.path, json=dialect.body(prompt_ids, num_new, model))
        total_ms = (time.perf_counter() - start) * 1e3
        try:
            token_ids = dialect.token_ids(reply.json())
        except (ValueError, LookupError, TypeError) as error:
            raise typer.BadParameter(
                f"{name} gave no token ids, but {reply.status_code}: {reply.text[:200]}"
            ) from error
        return Answer(tuple(token_ids), None, total_ms)

    return name, run
