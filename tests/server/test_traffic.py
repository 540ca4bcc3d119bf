"""The log of traffic: lines that `adapt` reads, private, never in anybody's way, and whole or not at all."""

import asyncio
import errno
import json
import logging
import os
import stat
import threading

import pytest

from orthrus.base.prompt_files import read_prompt_file
from orthrus.errors import OrthrusError, StorageError, UserInputError
from orthrus.server import traffic
from orthrus.server.app import create_app
from orthrus.server.settings import ServeConfig
from orthrus.server.traffic import TrafficLog

from .conftest import END, byte_orthrus, chat, run, serving, text

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDS = {"logit_bias": {str(END): 12}, "ignore_eos": False, "min_tokens": 5, "max_tokens": 60}
"""An answer that ends by itself."""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "traffic.jsonl"


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def logged(orthrus, file, *bodies, path=CHAT):
    """Ask each, one after the other; returns (answers, lines)."""

    async def check():
        async with serving(orthrus, log_traffic=file) as client:
            found = []
            for number, body in enumerate(bodies):
                response = await client.post(path, json=body, headers={"x-request-id": f"r{number}"})
                assert response.status_code == 200, response.text
                found.append(response)
        return found

    return run(check), lines(file)


def test_nothing_is_written_unless_it_is_asked_for(orthrus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def check():
        async with serving(orthrus) as client:
            assert client.service.traffic is None
            await client.post(CHAT, json=chat())

    run(check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_chat_is_a_line_that_adapt_reads(orthrus, file, stream):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\u2028there\n"}]
    ((answer,), (line,)) = logged(orthrus, file, chat(**ENDS) | {"messages": messages, "stream": stream})
    *asked, said = line["messages"]
    assert asked == messages
    assert said["role"] == "assistant"
    if not stream:
        assert said["content"] == answer.json()["choices"][0]["message"]["content"]
        assert line["num_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert (line["request_id"], line["finish_reason"], line["strategy"]) == ("r0", "stop", "chain")
    assert 0 < line["num_accepted"] <= line["num_drafted"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (read,) = read_prompt_file(file)
    assert read.prompt == line["messages"]


def test_adapt_learns_from_a_log_of_traffic(orthrus, file):
    from orthrus.training.adapt import LEAST_REQUESTS, read_log

    bodies = [chat(f"Question {number}", **(ENDS | {"max_tokens": 30})) for number in range(LEAST_REQUESTS)]
    answers, _ = logged(orthrus, file, *bodies)
    requests = read_log(file, orthrus.base, most_tokens=500)
    prompts = [orthrus.base.encode_prompt(body["messages"]) for body in bodies]
    assert [list(request.prompt_ids) for request in requests] == prompts
    ended = [a.json()["choices"][0]["finish_reason"] == "stop" for a in answers]
    assert any(ended)
    assert [request.answer_ids is not None for request in requests] == ended


def test_an_answer_that_was_cut_is_left_to_the_model(orthrus, file):
    """`adapt` would take it for a whole one, end included."""
    _, found = logged(orthrus, file, chat(), chat(**ENDS | {"min_tokens": 0}, stop=["e", "t", "a", "\ufffd"]))
    assert [line["finish_reason"] for line in found] == ["length", "stop"]
    assert [line["messages"] for line in found] == [[{"role": "user", "content": "Hi"}]] * 2


def test_a_continued_answer_is_one_answer(orthrus, file):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    answers, (whole, cut) = logged(
        orthrus, file, chat(**ENDS) | {"messages": messages}, chat() | {"messages": messages}
    )
    said = answers[0].json()["choices"][0]["message"]["content"]
    assert whole["messages"] == [messages[0], {"role": "assistant", "content": f"Well, {said}"}]
    assert cut["messages"] == [messages[0]]


def test_messages_are_written_as_the_model_read_them(orthrus, file):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
    ]
    _, (line,) = logged(orthrus, file, chat() | {"messages": messages})
    assert line["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two"},
    ]
    assert orthrus.base.encode_prompt(line["messages"])


def test_dialogues_with_tools_and_completions_are_left_out(orthrus, file):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    _, found = logged(orthrus, file, chat() | {"messages": messages})
    assert found == []
    _, found = logged(orthrus, file, text("Hi"), path=TEXT)
    assert found == []


def test_several_texts_are_several_lines_behind_what_was_there(orthrus, file):
    file.write_text('{"prompt": "older"}\n')
    _, found = logged(orthrus, file, chat(n=3, temperature=1.0, seed=1, **ENDS))
    assert len(found) == 4
    assert found[0] == {"prompt": "older"}
    assert len({line["messages"][-1]["content"] for line in found[1:]}) == 3


def test_a_client_that_leaves_leaves_no_line(file):
    orthrus = byte_orthrus()

    async def check():
        async with serving(orthrus, log_traffic=file) as client:
            task = asyncio.ensure_future(client.post(CHAT, json=chat(max_tokens=200)))
            while not client.service.live.loop.num_open:
                await asyncio.sleep(0.001)
            for call in client.service.live.loop.calls:
                call.cancel()
            await task

    run(check)
    assert lines(file) == []


def offered(log, orthrus, number=1):
    """Answers handed to a log without a server."""
    from orthrus.api import decode_config
    from orthrus.server.calls import Call
    from orthrus.server.origin import Origin
    from orthrus.server.schemas import Message

    ids = orthrus.base.encode_prompt([{"role": "user", "content": "Hi"}])
    request = orthrus.submit(ids, decode_config(max_new_tokens=4, strategy="ar", ignore_eos=True))
    while not request.closed:
        orthrus.engine.step()
    call = Call(1, 1, orthrus.engine.cancel)
    call.origin = Origin("r", (Message(role="user", content="Hi"),))
    for _ in range(number):
        log.offer(orthrus, call, request)


def warnings(caplog):
    return [r.data["reason"] for r in caplog.records if r.getMessage() == "traffic is not logged"]


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("orthrus.server"), "propagate", True)
    return caplog


def test_a_vanished_folder_is_told_once_and_costs_lines_only(orthrus, tmp_path, heard):
    folder = tmp_path / "logs"
    folder.mkdir()
    log = TrafficLog(folder / "traffic.jsonl")
    (folder / "traffic.jsonl").unlink()
    folder.rmdir()
    offered(log, orthrus, 3)
    while not log._lines.empty():
        pass
    folder.mkdir()
    offered(log, orthrus)
    log.close()
    assert warnings(heard) == [os.strerror(errno.ENOENT)]
    assert len(lines(folder / "traffic.jsonl")) >= 1


def test_a_full_disk_leaves_no_half_line(orthrus, file, heard, monkeypatch):
    log = TrafficLog(file)
    write, sizes = os.write, iter([20, None, None, 0, 10**6])

    def full(handle, data):
        size = next(sizes, 10**6)
        if size is None or size == 0:
            raise OSError(errno.ENOSPC, "no space")
        return write(handle, bytes(data)[:size])

    monkeypatch.setattr(traffic.os, "write", full)
    offered(log, orthrus, 4)
    log.close()
    monkeypatch.undo()
    assert warnings(heard) == [os.strerror(errno.ENOSPC)]
    assert len(lines(file)) == 1


def test_a_file_that_was_moved_away_begins_anew(orthrus, file):
    log = TrafficLog(file)
    offered(log, orthrus)
    while not (file.exists() and file.read_text()):
        pass
    file.rename(file.with_name("old.jsonl"))
    offered(log, orthrus)
    log.close()
    assert len(lines(file)) == len(lines(file.with_name("old.jsonl"))) == 1


def test_whoever_hands_in_lines_never_waits(orthrus, file, heard, monkeypatch):
    may_go = threading.Event()
    append = TrafficLog._append
    monkeypatch.setattr(TrafficLog, "_append", lambda self, line: (may_go.wait(60), append(self, line)))
    monkeypatch.setattr(traffic, "MOST_WAITING", 4)
    log = TrafficLog(file)
    offered(log, orthrus, 10)
    assert warnings(heard) == ["too many lines wait"]
    may_go.set()
    log.close()
    assert 4 <= len(lines(file)) <= 5


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("missing/traffic.jsonl", None, "No such file"),
        ("folder", "folder", "Is a directory"),
        ("pipe", "pipe", "No such device"),
        ("/dev/null", None, "no ordinary file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, name, kind, told):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)

    def load():
        raise AssertionError("nothing is loaded")

    with pytest.raises((UserInputError, StorageError), match=told) as refused:
        create_app(load, ServeConfig(log_traffic=path))
    assert isinstance(refused.value, OrthrusError)


def test_a_file_without_its_last_line_break_loses_no_line(orthrus, file):
    file.write_text('{"prompt": "old"}')
    _, found = logged(orthrus, file, chat(), chat())
    assert [sorted(line)[:1] for line in found] == [["prompt"], ["finish_reason"], ["finish_reason"]]


def test_a_chat_that_its_messages_do_not_repeat_is_not_logged(orthrus, file):
    others = (
        {"chat_template_kwargs": {"shout": True}},
        {"response_format": {"type": "json_object"}, "ignore_eos": False},
    )
    _, found = logged(orthrus, file, *(chat(**fields) for fields in others), chat())
    assert [line["request_id"] for line in found] == ["r2"]


def test_a_file_that_others_may_read_is_warned_of(file, caplog):
    file.touch(0o600)
    TrafficLog(file).close()
    assert not caplog.records
    file.chmod(0o644)
    TrafficLog(file).close()
    assert [record.message for record in caplog.records] == ["others can read the traffic"]
