"""`orthrus serve`: what it hands on, and what it refuses before a model is loaded."""

import sys

import pytest

from .conftest import Cli, assert_refused


@pytest.fixture
def served(monkeypatch):
    """What the command would serve."""
    found = {}

    def run(load, config, host, port):
        found.update(load=load, config=config, host=host, port=port)

    monkeypatch.setattr("orthrus.server.run.serve", run)
    return found


def test_options_reach_the_server(cli: Cli, served):
    done = cli(
        *("serve", "--port", "9000", "--api-key", "secret", "--max-queue", "3", "--max-running", "2"),
        *("--name", "a", "--name", "b", "--drain", "1.5", "--timeout", "9", "--audit-share", "0.25"),
    )
    assert done.code == 0, done.err
    config = served["config"]
    assert (served["host"], served["port"]) == ("127.0.0.1", 9000)
    assert config.api_keys == ("secret",)
    assert config.names == ("a", "b")
    assert (config.max_queue, config.max_running, config.drain, config.timeout) == (3, 2, 1.5, 9.0)
    assert (config.audit_share, config.log_traffic) == (0.25, None)
    assert "secret" not in repr(config)


def test_a_key_may_come_from_the_environment(cli: Cli, served, monkeypatch):
    monkeypatch.setenv("ORTHRUS_API_KEY", "hidden")
    assert cli("serve").code == 0
    assert served["config"].api_keys == ("hidden",)


def test_an_open_door_is_named(cli: Cli, served):
    assert "anybody who reaches 0.0.0.0" in cli("serve", "--host", "0.0.0.0").err
    assert "anybody" not in cli("serve", "--host", "0.0.0.0", "--api-key", "k").err


def test_a_log_of_traffic_is_announced(cli: Cli, served, tmp_path):
    file = tmp_path / "traffic.jsonl"
    assert "appended" not in cli("serve").err
    run = cli("serve", "--log-traffic", str(file), "--quiet")
    assert run.err.splitlines() == [f"the texts of prompts and answers are appended to {file}"]
    assert served["config"].log_traffic == file


def test_a_log_that_cannot_be_written_is_refused_before_a_model_is_loaded(cli: Cli, tmp_path, monkeypatch):
    monkeypatch.setattr("orthrus.server.run.log_to_stderr", lambda: None)
    monkeypatch.setattr("orthrus.cli.serve.load_orthrus", lambda *a, **k: pytest.fail("loaded"))
    assert_refused(
        cli("serve", "--log-traffic", str(tmp_path / "no" / "file")), "No such file", "name a file"
    )


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--api-key", ""], "API key"),
        (["--api-key", "schlüssel"], "API key"),
        (["--cors-origin", "*"], "name the origins"),
        (["--host", " "], "--host is empty"),
        (["--port", "0"], "port"),
        (["--max-running", "0"], "max-running"),
        (["--audit-share", "1.5"], "audit-share"),
    ],
)
def test_wrong_options_are_refused(cli: Cli, served, args, told):
    assert_refused(cli("serve", *args), told)
    assert not served


def test_a_missing_extra_is_named(cli: Cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_refused(cli("serve"), 'pip install "orthrus-lm[serve]"')
