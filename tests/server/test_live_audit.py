"""Live traffic is audited while nobody waits: what is sound passes, what is planted is found, and nobody is slowed."""

import asyncio
import json
import logging
import re
import time

import pytest
from tests.faults import plant_tie

from orthrus.model.dual_view import DualView
from orthrus.server import live_audit
from orthrus.server.calls import Call
from orthrus.server.live_audit import LiveAudit, is_chosen
from orthrus.server.origin import Origin

from .conftest import byte_orthrus, chat, run, serving, text

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STRATEGIES = ("ar", "chain", "tree", "fused_tree")


async def settled(client):
    """Until the audit has nothing to do; returns its summary."""
    audit = client.service.live.audit
    while audit.has_work:
        await asyncio.sleep(0.005)
    # The last step may still be counting.
    await asyncio.sleep(0.02)
    return (await client.get("/audit")).json()


def figures(page):
    """Counters and counts of a page of metrics, by name."""
    return {name: float(value) for name, value in re.findall(r"^(orthrus_\w+) ([\d.e+]+)$", page, re.M)}


def accept_everything(monkeypatch):
    """Drafts are committed unseen."""
    monkeypatch.setattr("orthrus.engine.work.accepted_rows", lambda tree, ar_ids: tree.paths()[-1])


BODIES = [
    chat(temperature=0.9, seed=1, n=2, max_tokens=20),
    chat(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={"70": 2}),
    chat(temperature=1.2, top_p=0.7, top_k=20, min_p=0.02, max_tokens=30),
    chat(stop_token_ids=list(range(60, 80)), min_tokens=4, max_tokens=40),
    chat(response_format={"type": "json_object"}, ignore_eos=False, temperature=1.0, max_tokens=30),
    chat("x" * 80, max_tokens=30),
]


def test_sound_answers_are_identical_whatever_their_settings():
    orthrus = byte_orthrus()

    async def check():
        async with serving(orthrus, audit_share=1.0, max_queue=100) as client:
            bodies = [
                {"seed": 6} | body | {"orthrus": {"strategy": s}} for body in BODIES for s in STRATEGIES
            ]
            got = await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))
            assert [r.status_code for r in got] == [200] * len(bodies)
            summary = await settled(client)
            page = (await client.get("/metrics")).text
        return len(bodies), summary, page

    number, summary, page = run(check)
    # One body asks for two texts.
    number += len(STRATEGIES)
    assert summary["differences"] == []
    assert (summary["checked"], summary["identical"]) == (number, number)
    assert (summary["near_tie"], summary["violation"], summary["dropped"]) == (0, 0, 0)
    found = figures(page)
    assert found["orthrus_audit_checked_total"] == found["orthrus_audit_identical_total"] == number
    assert found["orthrus_audit_violation_total"] == 0
    # Replays are no requests.
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "request_queue_time_seconds"):
        assert found[f"orthrus_{name}_count"] == number


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_planted_differences_are_violations_with_evidence(monkeypatch, caplog, fields):
    accept_everything(monkeypatch)
    monkeypatch.setattr(logging.getLogger("orthrus.server"), "propagate", True)
    orthrus = byte_orthrus()

    async def check():
        async with serving(orthrus, audit_share=1.0, api_keys=("secret",)) as client:
            keyed = {"headers": {"x-api-key": "secret"}}
            body = text("a very private prompt", max_tokens=40, seed=4, return_token_ids=True, **fields)
            answer = await client.post(
                TEXT, json=body, headers={"x-api-key": "secret", "x-request-id": "mine"}
            )
            client.headers["x-api-key"] = "secret"
            summary = await settled(client)
            (line,) = summary["differences"]
            one = await client.get(f"/audit/{line['id']}", **keyed)
            missing = await client.get("/audit/99", **keyed)
            del client.headers["x-api-key"]
            closed = [(await client.get(path)).status_code for path in ("/audit", f"/audit/{line['id']}")]
            return answer.json(), summary, line, one.json(), missing, closed

    answer, summary, line, one, missing, closed = run(check)
    ids = answer["choices"][0]["token_ids"]
    assert (summary["checked"], summary["violation"], summary["identical"]) == (1, 1, 0)
    assert (line["request_id"], line["verdict"], line["strategy"]) == ("mine", "broken rule", "chain")
    assert closed == [401, 401]
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    place, first = one["position"], one["first_shown"]
    assert one["our_ids"] == ids[first : place + 9]
    assert len(one["our_ids"]) <= 17
    assert one["plain_ids"][: place - first] == one["our_ids"][: place - first]
    assert one["plain_ids"][place - first] != one["our_ids"][place - first]
    assert one["seed"] == answer["metrics"]["orthrus"]["seed"]
    assert "was not committed" in one["reason"]
    assert one["gap"] >= 0.0
    assert one["rounding_spread"] is not None
    assert {"gap", "rounding_spread"} <= one["legend"].keys()
    kept = json.dumps(one) + json.dumps(summary)
    assert "private" not in kept
    assert "prompt_ids" not in kept
    (told,) = [r for r in caplog.records if "plain decoding" in r.getMessage()]
    assert told.levelname == "ERROR"


def test_a_near_tie_is_none_of_the_violations(monkeypatch):
    """Two tokens with one row of the head; which one wins hangs on how many rows are projected."""
    orthrus = byte_orthrus()
    prompt = orthrus.base.encode_prompt("Hi", raw=True)
    favourite = orthrus.generate("Hi", raw=True, max_new_tokens=3, ignore_eos=True).token_ids[2]
    twin = plant_tie(orthrus, favourite)
    head = DualView.head

    def nudged(self, hidden, *, drafts=False):
        logits = head(self, hidden, drafts=drafts)
        if not drafts and logits.shape[0] > 1:
            logits[..., twin] += 1e-6
        return logits

    monkeypatch.setattr(DualView, "head", nudged)

    async def check():
        async with serving(orthrus, audit_share=1.0) as client:
            for body in (
                text(prompt, max_tokens=30),
                # Which of the two is drawn hangs on the seed, too.
                text(prompt, max_tokens=30, temperature=1.0, top_k=1, seed=1, n=8),
            ):
                assert (await client.post(TEXT, json=body)).status_code == 200
            return await settled(client)

    summary = run(check)
    assert summary["violation"] == 0
    assert summary["near_tie"] >= 3
    assert summary["near_tie"] + summary["identical"] == summary["checked"] == 9
    assert {each["verdict"] for each in summary["differences"]} == {"near-tie"}


def test_replays_run_only_while_nobody_waits():
    orthrus = byte_orthrus()
    busy = []

    async def check():
        async with serving(orthrus, audit_share=1.0) as client:
            audit = client.service.live.audit
            step = audit.step

            def watched():
                busy.append(orthrus.engine.has_work)
                time.sleep(0.002)
                step()

            audit.step = watched
            for number in range(3):
                body = text(f"{number}", max_tokens=60)
                assert (await client.post(TEXT, json=body)).status_code == 200
            left = audit.has_work
            return left, await settled(client)

    left, summary = run(check)
    # The last answer was there before its own replay had ended.
    assert left
    assert summary["identical"] == 3
    # A request may arrive between the look and the step, hardly ever twice.
    assert sum(busy) <= 3 < len(busy)


def offered(audit, orthrus, number=0, **fields):
    """Hand the audit a finished answer, outside any server."""
    from orthrus.api import decode_config

    options = {"max_new_tokens": 30, "ignore_eos": True, "strategy": "chain", "seed": number} | fields
    request = orthrus.submit(orthrus.base.encode_prompt("Hi", raw=True), decode_config(**options))
    while not request.closed:
        orthrus.engine.step()
    call = Call(1, 1, orthrus.engine.cancel)
    call.origin = Origin(f"request {number}")
    audit.offer(call, 0, request)
    return request


def test_an_explanation_gives_way_and_begins_again(monkeypatch):
    orthrus = byte_orthrus()
    audit = LiveAudit(orthrus, 1.0)
    accept_everything(monkeypatch)
    offered(audit, orthrus)
    while not (audit._replay is not None and audit._replay.done):
        audit.step()
    waiting = orthrus.submit(orthrus.base.encode_prompt("Ho", raw=True), audit._current.answered.config)
    passes = []
    orthrus.engine.runner.hidden = lambda *args: passes.append(1)
    audit.step()
    assert passes == []
    assert audit.has_work
    assert audit.counts.checked == 0
    del orthrus.engine.runner.hidden
    while not waiting.closed:
        orthrus.engine.step()
    audit.step()
    assert (audit.counts.checked, audit.counts.violation) == (1, 1)
    assert not audit.has_work


def test_a_server_that_leaves_waits_for_no_explanation(monkeypatch):
    orthrus = byte_orthrus()
    audit = LiveAudit(orthrus, 1.0)
    accept_everything(monkeypatch)
    offered(audit, orthrus)
    while not (audit._replay is not None and audit._replay.done):
        audit.step()
    audit.stop()
    orthrus.engine.runner.hidden = lambda *args: pytest.fail("a pass was run")
    audit.step()
    assert not audit.has_work
    assert audit.counts.checked == audit.counts.dropped == 0


def test_what_does_not_fit_into_the_queue_is_dropped_and_counted():
    orthrus = byte_orthrus()
    audit = LiveAudit(orthrus, 1.0, most=2)
    for number in range(5):
        offered(audit, orthrus, number)
    assert (audit.counts.dropped, audit.summary()["waiting"]) == (3, 2)
    while audit.has_work:
        audit.step()
    assert (audit.counts.checked, audit.counts.identical) == (2, 2)


def test_a_replay_that_fails_is_dropped_and_the_next_one_runs():
    orthrus = byte_orthrus()
    audit = LiveAudit(orthrus, 1.0)
    offered(audit, orthrus, 0)
    offered(audit, orthrus, 1)
    hidden = orthrus.engine.runner.hidden

    def fail(*args):
        del orthrus.engine.runner.hidden
        raise RuntimeError("planted")

    assert hidden is not None
    orthrus.engine.runner.hidden = fail
    while audit.has_work:
        audit.step()
    assert (audit.counts.dropped, audit.counts.identical) == (1, 1)


def test_failed_cancelled_and_empty_answers_are_not_audited():
    orthrus = byte_orthrus()
    audit = LiveAudit(orthrus, 1.0)
    request = offered(audit, orthrus)
    call = Call(1, 1, orthrus.engine.cancel)
    for name, value in (("finish", "cancelled"), ("failure", RuntimeError()), ("token_ids", [])):
        before = getattr(request, name)
        setattr(request, name, value)
        audit.offer(call, 0, request)
        setattr(request, name, before)
    assert audit.summary()["waiting"] == 1
    LiveAudit(orthrus, 0.0).offer(call, 0, request)


def test_only_the_last_differences_are_kept(monkeypatch):
    monkeypatch.setattr(live_audit, "MOST_KEPT", 3)
    orthrus = byte_orthrus()
    audit = LiveAudit(orthrus, 1.0)
    accept_everything(monkeypatch)
    for number in range(5):
        offered(audit, orthrus, number, max_new_tokens=12)
        while audit.has_work:
            audit.step()
    kept = audit.summary()["differences"]
    assert [each["request_id"] for each in kept] == ["request 4", "request 3", "request 2"]
    assert audit.evidence(kept[0]["id"])["index"] == 0
    assert audit.evidence("1") is None
    assert audit.counts.violation == 5


def test_the_share_is_kept_and_decided_by_id_and_number():
    chosen = [is_chosen("one id for all", number, 0.05) for number in range(20_000)]
    assert 0.04 < sum(chosen) / len(chosen) < 0.06
    assert chosen == [is_chosen("one id for all", number, 0.05) for number in range(20_000)]
    assert chosen != [is_chosen("another", number, 0.05) for number in range(20_000)]
    assert not any(is_chosen("x", number, 0.0) for number in range(1000))
    assert all(is_chosen("x", number, 1.0) for number in range(1000))


def test_without_a_share_there_is_an_empty_audit(orthrus):
    async def check():
        async with serving(orthrus) as client:
            await client.post(TEXT, json=text("Hi"))
            return (await client.get("/audit")).json(), (await client.get("/metrics")).text

    summary, page = run(check)
    assert (summary["share"], summary["checked"], summary["differences"]) == (0.0, 0, [])
    assert figures(page)["orthrus_audit_checked_total"] == 0


def test_an_engine_beside_waits_for_the_other_ones_passes(orthrus):
    from orthrus.engine.beside import EngineBeside

    beside = EngineBeside(orthrus.engine)
    assert beside.held() is orthrus.engine.held()
