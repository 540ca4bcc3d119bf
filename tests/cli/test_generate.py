"""`orthrus generate`: what goes where, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orthrus.api import Orthrus
from orthrus.base.loading import load_base
from orthrus.base.text import printable
from orthrus.cli import common
from orthrus.cli.render import DraftMarker
from orthrus.config import FIXED_STRATEGIES
from orthrus.model.checkpoint import save_view, untrained_view
from orthrus.types import Cycle

from .conftest import Cli, assert_refused, byte_tokenizer

UNTRAINED = ("--view", "untrained", "--ignore-eos", "-n", "24")


def expected_text(folder: str, prompt: str = "hello", **decode: object) -> str:
    options = {"max_new_tokens": 24, "ignore_eos": True, "strategy": "ar"} | decode
    return printable(Orthrus.load(folder, view="untrained").generate(prompt, **options).text)


def test_text_on_stdout_statistics_on_stderr(cli: Cli, model_folder: str) -> None:
    run = cli("generate", model_folder, "hello", *UNTRAINED)
    assert run.code == 0
    assert run.out == expected_text(model_folder) + "\n"
    for words in ("24 tokens", "tokens/s", "first token after", "tokens per cycle", "tokens per forward"):
        assert words in run.err
    assert "acceptance rate" in run.err


@pytest.mark.parametrize(
    "options",
    [
        ("--no-stream",),
        ("--strategy", "ar"),
        ("--no-floor",),
        ("-k", "3"),
        ("--strategy", "tree", "--node-budget", "5"),
        ("--strategy", "fused", "--block-budget", "2"),
        ("--strategy", "fused_tree"),
    ],
)
def test_greedy_text_is_the_same_whatever_the_options(
    cli: Cli, model_folder: str, options: tuple[str, ...]
) -> None:
    assert (
        cli("generate", model_folder, "hello", *UNTRAINED, *options).out == expected_text(model_folder) + "\n"
    )


def test_quiet_leaves_stderr_empty(cli: Cli, model_folder: str) -> None:
    assert cli("generate", model_folder, "hello", *UNTRAINED, "--quiet").err == ""


def test_json_is_one_object_with_everything(cli: Cli, model_folder: str) -> None:
    run = cli("generate", model_folder, "hello", *UNTRAINED, "--json", "--color")
    result = json.loads(run.out)
    assert printable(result["text"]) == expected_text(model_folder)
    assert len(result["token_ids"]) == result["stats"]["num_tokens"] == 24
    assert result["finish_reason"] == "length"
    assert result["stats"]["tokens_per_forward"] > 0
    assert result["model"]["block_size"] == 8
    assert result["decode"]["strategy"] == "auto"
    assert result["decode"]["logit_bias"] is None


def test_budgets_reach_the_settings(cli: Cli, model_folder: str) -> None:
    options = ("--strategy", "fused_tree", "--node-budget", "5", "--block-budget", "2")
    result = json.loads(cli("generate", model_folder, "hello", *UNTRAINED, *options, "--json").out)
    assert (result["decode"]["node_budget"], result["decode"]["block_budget"]) == (5, 2)
    # No pass has more rows than the anchor, 5 nodes and 2 blocks of 8.
    assert 1 < result["stats"]["rows_per_pass"] <= 1 + 5 + 2 * 8


def test_one_seed_is_one_text_whatever_the_strategy(cli: Cli, model_folder: str) -> None:
    options = ("-t", "1.5", "--seed", "4", "--quiet")
    texts = {
        cli("generate", model_folder, "hello", *UNTRAINED, *options, "--strategy", s).out
        for s in FIXED_STRATEGIES
    }
    assert len(texts) == 1
    assert texts != {cli("generate", model_folder, "hello", *UNTRAINED, "--quiet").out}


def test_logit_rules_reach_the_settings(cli: Cli, model_folder: str) -> None:
    options = ("--repetition-penalty", "1.2", "--logit-bias", "5=-100", "--logit-bias", "7=1.5")
    decode = json.loads(cli("generate", model_folder, "hello", *UNTRAINED, *options, "--json").out)["decode"]
    assert decode["repetition_penalty"] == 1.2
    assert decode["logit_bias"] == {"5": -100.0, "7": 1.5}


@pytest.mark.parametrize("words", [("-",), ()])
def test_prompt_from_stdin(
    cli: Cli, model_folder: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not words:
        # Without arguments the default model answers: here, the tiny one under its name.
        load = common.load_orthrus
        monkeypatch.setattr(
            "orthrus.cli.generate.load_orthrus", lambda model, **options: load(model_folder, **options)
        )
        assert cli("generate", *UNTRAINED, stdin="hello\n").out == expected_text(model_folder) + "\n"
        return
    assert (
        cli("generate", model_folder, *words, *UNTRAINED, stdin="hello\n").out
        == expected_text(model_folder) + "\n"
    )


def test_system_raw_and_stop_reach_the_model(cli: Cli, model_folder: str) -> None:
    plain = expected_text(model_folder)
    raw = cli("generate", model_folder, "hello", *UNTRAINED, "--raw").out
    assert raw != plain + "\n"
    assert cli("generate", model_folder, "hello", *UNTRAINED, "--system", "be brief").out not in (
        plain + "\n",
        raw,
    )
    stop = plain[5:7]
    assert (
        cli("generate", model_folder, "hello", *UNTRAINED, "--stop", stop).out
        == plain[: plain.index(stop)] + "\n"
    )


def test_seed_repeats_a_sample(cli: Cli, model_folder: str) -> None:
    sampled = (*UNTRAINED, "-t", "1.5", "--top-k", "50", "--seed", "7")
    first = cli("generate", model_folder, "hello", *sampled).out
    assert cli("generate", model_folder, "hello", *sampled).out == first


def test_color_underlines_drafts_and_changes_no_text(
    cli: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    chain = (*UNTRAINED, "--strategy", "chain", "--color")
    run = cli("generate", model_folder, "hello", *chain)
    assert "\x1b[4;36m" in run.out
    assert "underlined" in run.err
    plain = run.out.replace("\x1b[4;36m", "").replace("\x1b[0m", "")
    assert plain == expected_text(model_folder) + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    without = cli("generate", model_folder, "hello", *chain).out
    assert without == run.out.replace("4;36m", "4m")


def test_marks_follow_characters_that_span_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aä")["input_ids"]
    cycles = [
        _cycle("a", ids[:1], [False]),
        _cycle("", ids[1:2], [False]),
        _cycle("ä", ids[2:], [True]),
        _cycle("a", ids[:1], [True]),
    ]
    marker = DraftMarker(tokenizer)
    marks = [marker.mark(cycle).count("\x1b") for cycle in cycles]
    assert marks == [0, 0, 2, 2]


def _cycle(text: str, ids: list[int], is_draft: list[bool]) -> Cycle:
    return Cycle(0, "chain", text, tuple(ids), tuple(is_draft), 0, 0, 2, 9, 0.0)


def test_warning_is_one_line_and_comes_once(cli: Cli, model_folder: str) -> None:
    run = cli("generate", model_folder, "hello", "-n", "3")
    assert run.code == 0
    assert [line for line in run.err.splitlines() if line.startswith("warning: ")] == [
        line for line in run.err.splitlines() if "no trained view" in line
    ]
    assert run.err.count("no trained view") == 1


def test_missing_model_and_folder_without_config(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("generate", str(tmp_path / "absent"), "hi"), "absent")
    (tmp_path / "empty").mkdir()
    assert_refused(cli("generate", str(tmp_path / "empty"), "hi"), "config.json")


def test_view_of_another_base(cli: Cli, model_folder: str, other_model_folder: str, tmp_path: Path) -> None:
    save_view(untrained_view(load_base(other_model_folder)), tmp_path / "view")
    assert_refused(
        cli("generate", model_folder, "hi", "--view", str(tmp_path / "view")), "does not fit this base"
    )


def test_block_size_out_of_range(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    save_view(untrained_view(load_base(model_folder), block_size=4), tmp_path / "view")
    view = ("--view", str(tmp_path / "view"))
    assert cli("generate", model_folder, "hi", "-n", "5", "-k", "4", *view).code == 0
    assert_refused(cli("generate", model_folder, "hi", "-k", "5", *view), "block_size 5", "2 to 4")
    assert_refused(cli("generate", model_folder, "hi", "-k", "1", *view), "block_size", "at least 2")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(cli: Cli, model_folder: str, prompt: str) -> None:
    assert_refused(cli("generate", model_folder, prompt), "prompt is empty")
    assert_refused(cli("generate", model_folder, "-", stdin=prompt), "prompt is empty")


def test_prompt_longer_than_the_context(cli: Cli, model_folder: str) -> None:
    assert_refused(cli("generate", model_folder, "x" * 400, *UNTRAINED), "context holds 256")


def test_no_prompt_at_a_terminal(cli: Cli) -> None:
    assert_refused(cli("generate", tty=True), "there is no prompt")


def test_a_model_without_a_prompt(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for model in (model_folder, str(gguf)):
        assert_refused(cli("generate", model, tty=True), f"{model} is a model, and there is no prompt")


def test_unquoted_prompt(cli: Cli) -> None:
    assert_refused(cli("generate", "why", "is", "it"), "quotes")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--strategy", "beam"), "'ar', 'chain'"),
        (("--node-budget", "0"), "node_budget must be at least 1"),
        (("--block-budget", "0"), "block_budget must be at least 1"),
        (("-t", "-1"), "temperature"),
        (("--top-p", "2"), "top_p"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--logit-bias", "42"), "as in 42=-100, not '42'"),
        (("--logit-bias", "x=1"), "as in 42=-100, not 'x=1'"),
        (("--logit-bias", "-3=1"), "whole number from 0, not -3"),
        (("--logit-bias", "3=inf"), "logit_bias of token 3"),
        (("--logit-bias", "3=1", "--logit-bias", "3=2"), "token 3 has two"),
        (("-n", "0"), "max_new_tokens"),
        (("--stop", ""), "stop"),
        (("--dtype", "float8"), "float8"),
        (("--device", "tpu9"), "tpu9"),
        (("--draft-vocab", "10"), "draft_vocab must lie between 16 and"),
        (("--draft-dtype", "float16"), "draft_dtype must be 'int8', 'int4' or left out, not 'float16'"),
        (("--runner", "fast"), "runner must be one of auto, eager, compiled, not 'fast'"),
        (("--attn", "flash_attention_2"), "mask"),
        (("--raw", "--system", "x"), "--system"),
        (("--revision", "main"), "revision"),
    ],
)
def test_wrong_options(cli: Cli, model_folder: str, options: tuple[str, ...], word: str) -> None:
    assert_refused(cli("generate", model_folder, "hi", *options), word)


def test_unforeseen_error_is_one_line_unless_verbose(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("boom\nbang")

    monkeypatch.setattr("orthrus.cli.generate.load_orthrus", fail)
    run = cli("generate", "hi")
    assert run.code == 1
    assert len(run.err.splitlines()) == 1
    assert run.err.startswith("error: unexpected RuntimeError: boom bang")
    assert "--verbose" in run.err
    verbose = cli("--verbose", "generate", "hi")
    assert verbose.code == 1
    assert "Traceback" in verbose.err


def _start(model_folder: str, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "orthrus.cli.app",
            "generate",
            model_folder,
            "hello",
            "--ignore-eos",
            *options,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        errors="replace",
    )


@pytest.fixture(scope="session")
def long_model_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    """The tiny model with a context that takes minutes to fill."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200_000}))
    return str(folder)


def test_interrupt_ends_the_answer_with_its_footer(long_model_folder: str) -> None:
    with _start(long_model_folder, "--view", "untrained", "-n", "20000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        err = process.stderr.read()
    assert process.returncode == 130
    assert "(cancelled)" in err
    assert "Traceback" not in err


def test_closed_pipe_is_no_traceback(long_model_folder: str) -> None:
    with _start(long_model_folder, "--view", "untrained", "-n", "20000", "--quiet") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == ""


@pytest.mark.parametrize("model", ["~nobody-of-this-name/m", "x" * 300, "why is the sky blue? " * 20])
def test_what_is_no_path_at_all_is_refused(cli: Cli, model: str) -> None:
    assert_refused(cli("generate", model, "hi"), "error: ")


SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'


@pytest.mark.parametrize("strategy", ["ar", "tree", "auto"])
def test_answers_keep_to_a_form(cli: Cli, model_folder: str, tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("llguidance")
    ask = (
        "generate",
        model_folder,
        "hello",
        "--view",
        "untrained",
        "-n",
        "40",
        "--quiet",
        "--strategy",
        strategy,
    )
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    compact = cli(*ask, "--json-schema", SCHEMA, "--compact-json")
    assert compact.out in ('{"a":1}\n', '{"a":2}\n')
    assert json.loads(cli(*ask, "--json-schema", str(file)).out)["a"] in (1, 2)
    assert cli(*ask, "--regex", "ab{3}").out == "abbb\n"
    file.write_text('start: "x" "y"')
    told = json.loads(cli(*ask, "--grammar", str(file), "--json").out)
    assert told["text"] == "xy"
    assert told["decode"]["grammar"] == {"kind": "lark", "text": 'start: "x" "y"', "compact": False}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--regex", "a", "--json-schema", "{}"), ["--json-schema and --regex", "give one"]),
        (("--compact-json",), ["--compact-json", "--json-schema"]),
        (("--json-schema", "nowhere.json"), ["nowhere.json cannot be read", "No such file"]),
        (("--json-schema", "{"), ["JSON"]),
        (("--grammar", "."), ["cannot be read", "directory"]),
        (("--regex", ""), ["the regex grammar is empty"]),
    ],
)
def test_wrong_forms_are_refused_before_the_model_is_loaded(
    cli: Cli, options: tuple[str, ...], words: list[str]
) -> None:
    assert_refused(cli("generate", "no-such-model", "hello", *options), *words)
