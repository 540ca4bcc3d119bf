"""What runs the server elsewhere cannot be run here: its commands, files and metric names are checked instead."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tests.docs.pages import code_blocks
from tests.tiny_orthrus import tiny_orthrus

from orthrus.cli.app import app
from orthrus.server.live_audit import LiveAudit
from orthrus.server.metrics import Metrics

ROOT = Path(__file__).parents[2]
SERVING = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
# What a shell has anyway.
SHELL = {"rm", "mkdir"}


def command_of(value: str) -> list[str]:
    """The words of RUN's or CMD's value, in either of its forms."""
    return json.loads(value) if value.startswith("[") else shlex.split(value)


def commands(words: list[str]) -> list[list[str]]:
    """Single commands, without whose rights they run with and the folder of their program."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    for i, each in enumerate(found):
        if each[0] == "sudo":
            found[i] = each[3:] if each[1] == "-u" else each[1:]
    return [[Path(program).name, *rest] for program, *rest in found]


def documented() -> dict[str, set[str]]:
    """Program -> options, of all that our pages and the Makefile run."""
    lines = [line for page in ("README.md", "CONTRIBUTING.md", "docs/serving.md") for line in blocks(page)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    makefile = makefile.replace("$(BIN)/python -m pip", "pip").replace("\\\n", " ")
    lines += [line.partition(":=")[2] for line in makefile.splitlines() if line.startswith("PIP :=")]
    found: dict[str, set[str]] = {}
    for line in lines:
        for program, *words in commands(shlex.split(line, comments=True)):
            found.setdefault(program, set()).update(w for w in words if w.startswith("-"))
    return found


def blocks(page: str) -> list[str]:
    return [
        line
        for block in code_blocks(ROOT / page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def check_orthrus(words: list[str]) -> None:
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    # Raises for an unknown option or a wrong value.
    command.make_context(words[0], words[1:])


def test_the_image_runs_only_what_the_docs_run_too() -> None:
    known = documented()
    ran = []
    for name, value in INSTRUCTIONS:
        if name == "HEALTHCHECK":
            value = value.split(" CMD ", 1)[1]
        if name not in ("RUN", "CMD", "HEALTHCHECK"):
            continue
        for program, *words in commands(command_of(value.strip())):
            ran.append(program)
            if program == "orthrus":
                check_orthrus(words)
            elif program == "python":
                assert words[0] == "-c"
                compile(words[1], "HEALTHCHECK", "exec")
                assert "/health" in words[1]
            elif program not in SHELL:
                options = {word for word in words if word.startswith("-")}
                assert options <= known[program], (program, options - known[program])
    assert {"apt-get", "useradd", "pip", "orthrus", "python"} <= set(ran)
    assert INSTRUCTIONS[-1][0] == "CMD"
    assert command_of(INSTRUCTIONS[-1][1])[:2] == ["orthrus", "serve"]


def test_the_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [source for name, value in INSTRUCTIONS if name == "COPY" for source in value.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    # All that the build reads.
    assert {"pyproject.toml", "README.md", "LICENSE", "src", "views"} <= set(copied)
    names = [name for name, _ in INSTRUCTIONS]
    user = dict(INSTRUCTIONS)["USER"]
    assert any(value == f"useradd --create-home {user}" for name, value in INSTRUCTIONS if name == "RUN")
    assert names.index("USER") < names.index("CMD")
    extras = re.findall(r"\.\[([\w,]+)\]", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    known = re.findall(
        r"^(\w[\w-]*) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(",".join(extras).split(",")) <= set(known)


def test_compose_mounts_files_that_are_there_and_opens_no_port_to_others() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"orthrus", "prometheus", "grafana"}
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith("./") else source in COMPOSE["volumes"]
        for port in service.get("ports", ()):
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), port
        # Another release tomorrow would be another set-up.
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    home = next(value for name, value in INSTRUCTIONS if name == "RUN" and value.startswith("mkdir"))
    assert services["orthrus"]["volumes"] == [f"cache:{home.split()[-1]}"]
    port = str(port_of_serve())
    assert services["orthrus"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert dict(INSTRUCTIONS)["EXPOSE"] == port
    # Time to drain.
    assert int(services["orthrus"]["stop_grace_period"].removesuffix("s")) > default_of_serve("drain")


def default_of_serve(name: str) -> Any:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return next(p for p in command.params if p.name == name).default


def port_of_serve() -> int:
    return int(default_of_serve("port"))


def test_prometheus_and_grafana_find_each_other() -> None:
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"orthrus:{port_of_serve()}"]}]
    assert job["metrics_path"] == "/metrics"
    mounts = dict(mount.split(":")[:2] for mount in COMPOSE["services"]["grafana"]["volumes"])
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/datasource.yml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/dashboards.yml").read_text(encoding="utf-8"))[
        "providers"
    ]
    assert Path(mounts["./docs/grafana.json"]).parent == Path(provider["options"]["path"])
    for kind in ("datasources", "dashboards"):
        assert any(target.startswith(f"/etc/grafana/provisioning/{kind}/") for target in mounts.values())


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Sample name -> its labels, of all that /metrics can tell."""
    metrics = Metrics()
    for counter in (metrics.finished, metrics.responses, metrics.accepted_at):
        counter.labels("1")
    orthrus = tiny_orthrus()
    metrics.watch(orthrus.engine, LiveAudit(orthrus, 1.0))
    found: dict[str, set[str]] = {}
    for line in metrics.page().decode().splitlines():
        if not line.startswith("#"):
            name, labels = re.match(r"(\w+)(?:\{(.*?)\})?", line).groups()  # type: ignore[union-attr]
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels or ""))
    return found


def test_the_dashboard_shows_only_what_metrics_tells(exposed: dict[str, set[str]]) -> None:
    board = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            names = set(re.findall(r"\borthrus_\w+", expression))
            assert names, panel["title"]
            assert names <= exposed.keys(), names - exposed.keys()
            asked |= names
            labels = {label for name in names for label in exposed[name]}
            for group in re.findall(r"\b(?:by|ignoring) ?\((\w+)\)", expression):
                assert group in labels, expression
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label in labels, target["legendFormat"]
            assert expression.count("(") == expression.count(")")
    # Nothing that is told goes unseen.
    stems = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in exposed}
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert {stem for stem in stems if stem.startswith("orthrus_")} == shown


def test_panels_do_not_lie_over_each_other() -> None:
    board = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_unit_starts_a_command_that_is_there() -> None:
    (unit,) = re.findall(r"```ini\n(.*?)```", SERVING, flags=re.DOTALL)
    settings = dict(
        line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#")
    )
    program, *words = shlex.split(settings["ExecStart"])
    assert Path(program).name == "orthrus"
    check_orthrus(words)
    drain = float(words[words.index("--drain") + 1])
    assert float(settings["TimeoutStopSec"]) > drain
    # The path is the one that the installation made.
    assert f"python3 -m venv {Path(program).parents[1]}\n" in SERVING
    assert f"useradd --system --create-home {settings['User']}\n" in SERVING
