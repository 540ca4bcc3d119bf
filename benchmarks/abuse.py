"""What a server takes from bad clients: python benchmarks/abuse.py [--help]

A server with the default model gets thousands of requests, most of them broken: malformed and oversized bodies,
clients that leave at a random byte, read slowly or close half of their socket. Then it runs with a queue of one
and almost no memory, is told to end under load, and is killed under load and started again. Every request must
be answered once or have lost its client, and whatever answers there are must be those of plain decoding.
"""

import asyncio
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from own_server import HOST, Server, served

from orthrus.base.event_stream import event_data
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance

MAX_BODY, CONCURRENT, PATIENCE = 65_536, 16, 120.0
CHAT = "/v1/chat/completions"
PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku.",
    "Count to ten.",
    "2 + 2 =",
    "Translate 'dog' into German.",
)
LEGEND = {
    "answers": "by kind of request: how many got which status; gone: the client had left; "
    "lost: neither an answer nor a client that left; late: no answer within two minutes; cut: a stream without its end",
    "different": "answers whose token ids are not those of plain decoding of the same prompt and seed, alone",
    "running, waiting, used": "requests and share of pages in use, of /metrics, when all clients have gone",
    "memory_mb": "resident memory of the server a fifth of the way in, and at the end",
    "restart_s": "from the start of the command to the first 200 of /ready, after SIGKILL",
}


def memory_mb(server: Server) -> float:
    return float(psutil.Process(server.process.pid).memory_info().rss) / 2**20


def figures(server: Server) -> dict[str, float]:
    """Of /metrics: what is still in use."""
    names = {
        "running": "orthrus_num_requests_running",
        "waiting": "orthrus_num_requests_waiting",
        "used": "orthrus_kv_cache_usage_perc",
    }
    for _ in range(100):
        page = asyncio.run(exchange(server.port, get("/metrics"))).decode()
        told = {key: float(re.search(rf"^{name} (\S+)$", page, re.M)[1]) for key, name in names.items()}  # type: ignore[index]
        if not any(told.values()):
            break
        time.sleep(0.1)
    return told


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()


def post(body: bytes, path: str = CHAT, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def asked(rng: random.Random, **more: Any) -> dict[str, Any]:
    """A request whose answer is known."""
    return {
        "messages": [{"role": "user", "content": rng.choice(PROMPTS)}],
        "seed": rng.randrange(3),
        "max_tokens": 8,
        "return_token_ids": True,
    } | more


async def exchange(port: int, request: bytes, half_close: bool = False, pause: float = 0.0) -> bytes:
    """The whole response; empty where there is none."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(request)
        await writer.drain()
        if half_close:
            writer.write_eof()
        pieces = []
        async with asyncio.timeout(PATIENCE):
            while piece := await reader.read(200 if pause else 65_536):
                pieces.append(piece)
                await asyncio.sleep(pause)
        return b"".join(pieces)
    finally:
        writer.close()


async def answered(port: int, request: bytes, **how: Any) -> tuple[str, bytes]:
    """(what became of a request, the response)."""
    try:
        response = await exchange(port, request, **how)
    except TimeoutError:
        return "late", b""
    except OSError:
        return "lost", b""
    is_http = response.startswith(b"HTTP/1.1 ")
    return response[9:12].decode("ascii", "replace") if is_http else "lost", response


async def leave(port: int, request: bytes, num_bytes: int, seconds: float) -> str:
    """Send the first bytes, wait, and go."""
    try:
        _, writer = await asyncio.open_connection(HOST, port)
        writer.write(request[:num_bytes])
        await writer.drain()
        await asyncio.sleep(seconds)
        writer.transport.abort()
    except OSError:
        pass
    return "gone"


class Abuser:
    """Makes requests of one seed and judges their answers. plain: tokens by (prompt, seed)."""

    def __init__(self, seed: int, plain: dict[tuple[str, int], list[int]]) -> None:
        self.rng, self.plain = random.Random(seed), plain
        self.counts: dict[str, Counter[str]] = {}
        self.num_different = 0
        rng = self.rng
        self.broken: dict[str, Callable[[], bytes]] = {
            "malformed": lambda: post(json.dumps(asked(rng)).encode()[: rng.randrange(1, 60)]),
            "invalid UTF-8": lambda: post(b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
            "NaN": lambda: post(b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'),
            "out of range": lambda: post(
                json.dumps(asked(rng, temperature=-(10 ** rng.randrange(30)))).encode()
            ),
            "wrong type": lambda: post(
                json.dumps(
                    asked(rng, **{rng.choice(["n", "stop", "messages", "tools"]): {"a": [1]}})
                ).encode()
            ),
            "deep": lambda: post(b"[" * 30_000),
            "oversized": lambda: post(b" " * 10, length=MAX_BODY + 1 + rng.randrange(10**9)),
            "no such path": lambda: get("/v1/" + "x" * rng.randrange(1, 2000)),
            "wrong method": lambda: get(CHAT),
            "no HTTP": lambda: rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n",
        }

    def count(self, kind: str, outcome: str) -> None:
        self.counts.setdefault(kind, Counter())[outcome] += 1

    async def one(self, port: int) -> None:
        """One request of any kind."""
        rng = self.rng
        kind = rng.choices(("broken", "leaving", "good"), (0.75, 0.13, 0.12))[0]
        if kind == "broken":
            kind = rng.choice([*self.broken])
            self.count(kind, (await answered(port, self.broken[kind]()))[0])
        elif kind == "leaving":
            long = asked(rng, stream=rng.random() < 0.5, max_tokens=200)
            long["messages"][0]["content"] *= rng.choice((1, 60))
            request = post(json.dumps(long).encode())
            num_bytes = rng.choice((rng.randrange(1, len(request)), len(request)))
            self.count("leaves", await leave(port, request, num_bytes, rng.choice((0.0, 0.05, 0.4))))
        else:
            await self.good(port)

    async def good(self, port: int) -> None:
        rng = self.rng
        how = rng.choice(("whole", "stream", "slow reader", "half closed"))
        body = asked(rng, stream=how in ("stream", "slow reader"))
        pause = 0.01 if how == "slow reader" else 0.0
        request = post(json.dumps(body).encode())
        outcome, response = await answered(port, request, half_close=how == "half closed", pause=pause)
        # A client that closes half of its socket may be taken for one that has left.
        if how == "half closed" and outcome == "lost":
            outcome = "gone"
        if outcome == "200" and body["stream"] and b"data: [DONE]" not in response:
            outcome = "cut"
        self.count(how, outcome)
        ids = token_ids(response) if outcome == "200" else None
        if ids is not None and ids != self.plain[body["messages"][0]["content"], body["seed"]]:
            self.num_different += 1

    async def many(self, port: int, number: int) -> None:
        left = iter(range(number))

        async def worker() -> None:
            for _ in left:
                await self.one(port)

        await asyncio.gather(*(worker() for _ in range(CONCURRENT)))


def token_ids(response: bytes) -> list[int] | None:
    """Of a whole answer or of a stream; None where an error ended it."""
    body = response.partition(b"\r\n\r\n")[2].decode()
    if "data: " not in body:
        return list(json.loads(body[body.index("{") : body.rindex("}") + 1])["choices"][0]["token_ids"])
    events = [json.loads(data) for data in event_data([body]) if data.startswith("{")]
    if any("error" in event for event in events):
        return None
    return [i for event in events for choice in event["choices"] for i in choice.get("token_ids", ())]


def plain_answers(port: int) -> dict[tuple[str, int], list[int]]:
    found = {}
    for prompt in PROMPTS:
        for seed in range(3):
            body = asked(random.Random(0), seed=seed, orthrus={"strategy": "ar"})
            body["messages"][0]["content"] = prompt
            ids = token_ids(asyncio.run(exchange(port, post(json.dumps(body).encode()))))
            assert ids is not None
            found[prompt, seed] = ids
    return found


def under_load(server: Server, abuser: Abuser, then: signal.Signals) -> int:
    """Send a signal while good requests are being answered; returns the exit code."""

    async def run() -> None:
        work = [asyncio.ensure_future(abuser.good(server.port)) for _ in range(CONCURRENT)]
        await asyncio.sleep(0.3)
        server.process.send_signal(then)
        await asyncio.gather(*work)

    asyncio.run(run())
    return server.process.wait(60)


def main(
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 10_000,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8 or int4.")] = "int8",
    seed: Annotated[int, typer.Option(help="Of what is asked, and when clients leave.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Where the result goes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="300 requests: a rehearsal.")] = False,
) -> None:
    requests = 300 if quick else requests
    base = ["--dtype", dtype, "--max-body", str(MAX_BODY)]
    report: dict[str, Any] = {"kind": "orthrus-abuse", "legend": LEGEND, "requests": requests, "phases": {}}

    def note(name: str, abuser: Abuser, **more: Any) -> None:
        counts = {kind: dict(counted) for kind, counted in sorted(abuser.counts.items())}
        report["phases"][name] = {"answers": counts, "different": abuser.num_different} | more
        typer.echo(f"{name}: {json.dumps(report['phases'][name])}", err=True)

    with served([*base, "--max-running", "8", "--max-queue", "64"]) as server:
        plain = plain_answers(server.port)
        abuser = Abuser(seed, plain)
        asyncio.run(abuser.many(server.port, requests // 5))
        memory = [memory_mb(server)]
        asyncio.run(abuser.many(server.port, requests * 7 // 10))
        memory.append(memory_mb(server))
        note("many kinds", abuser, **figures(server), memory_mb=memory)
        abuser = Abuser(seed + 1, plain)
        note("SIGTERM under load", abuser, exit_code=under_load(server, abuser, signal.SIGTERM))

    with served([*base, "--max-running", "8", "--max-queue", "1", "--max-slots", "512"]) as server:
        abuser = Abuser(seed + 2, plain)
        asyncio.run(abuser.many(server.port, requests // 10))
        note("queue of one, 512 slots", abuser, **figures(server))
        abuser = Abuser(seed + 3, plain)
        code = under_load(server, abuser, signal.SIGKILL)

    with served(base) as server:
        note("SIGKILL under load", abuser, exit_code=code, restart_s=server.start_s)
        abuser = Abuser(seed + 4, plain)
        asyncio.run(abuser.many(server.port, min(100, requests)))
        told = figures(server)
        server.process.terminate()
        note("after the restart", abuser, **told, exit_code=server.process.wait(60))

    report["provenance"] = provenance(device="cpu", dtype=dtype, seed=seed)
    path = output or Path(__file__).parent / "results" / "abuse-cpu.json"
    write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    phases = report["phases"].values()
    # Those whose server is killed lose their answers.
    lost = sum(
        counts.get("lost", 0) + counts.get("late", 0) + counts.get("cut", 0)
        for name, phase in report["phases"].items()
        if name != "SIGKILL under load"
        for counts in phase["answers"].values()
    )
    errors = sum(counts.get("500", 0) for phase in phases for counts in phase["answers"].values())
    different = sum(phase["different"] for phase in phases)
    typer.echo(json.dumps({"lost": lost, "errors": errors, "different": different}))
    if lost or errors or different:
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    typer.run(main)
