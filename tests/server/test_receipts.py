"""A receipt is enough to make an answer again elsewhere, and tells an answer that was changed from one that was not."""

import copy
import json

import pytest

from orthrus.api import Orthrus
from orthrus.audit.receipts import (
    check_model,
    check_versions,
    digest,
    find_receipt,
    make_receipt,
    read_receipt,
    verify,
)
from orthrus.errors import UserInputError

from .conftest import byte_orthrus, chat, events, run, serving, text

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STRATEGIES = ("ar", "chain", "fused_tree")


@pytest.fixture(scope="module")
def elsewhere() -> Orthrus:
    """The same model, loaded by somebody else."""
    return byte_orthrus()


def asking(strategy="chain", **more):
    return {"orthrus": {"strategy": strategy, "receipt": True} | more}


async def answers(orthrus, path, *bodies, **settings):
    async with serving(orthrus, **settings) as client:
        responses = [await client.post(path, json=body) for body in bodies]
    assert [r.status_code for r in responses] == [200] * len(bodies), responses[0].text
    return [r.json() for r in responses]


def received(answer):
    """The receipt of an answer, after a trip through a file."""
    return read_receipt(find_receipt(json.loads(json.dumps(answer))))


def test_an_answer_has_no_receipt_unless_it_is_asked_for(orthrus):
    (answer,) = run(answers, orthrus, CHAT, chat())
    assert "receipt" not in answer["metrics"]["orthrus"]
    with pytest.raises(UserInputError, match='"receipt": true'):
        find_receipt(answer)


def test_a_receipt_says_what_the_answer_was_made_of(orthrus):
    body = chat(temperature=0.8, seed=5, **asking())
    (answer,) = run(answers, orthrus, CHAT, body | {"return_token_ids": True})
    told = answer["metrics"]["orthrus"]["receipt"]
    ids = orthrus.base.encode_prompt([{"role": "user", "content": "Hi"}])
    assert told["kind"] == "orthrus-receipt"
    assert told["model"]["name"] == "tiny"
    # The place of a folder on the server is nobody's business.
    assert told["model"]["load"] is None
    assert told["model"]["base_fingerprint"] == orthrus.describe()["base_fingerprint"]
    assert (told["model"]["dtype"], told["model"]["runner"]) == ("float32", "eager")
    assert told["versions"].keys() == {"orthrus-lm", "torch", "transformers"}
    (part,) = told["texts"]
    assert part["prompt_ids"] == ids
    assert part["prompt_digest"] == digest(ids)
    assert part["token_ids"] == answer["choices"][0]["token_ids"]
    assert (part["num_tokens"], part["finish_reason"]) == (12, "length")
    assert (part["settings"]["seed"], part["settings"]["temperature"]) == (5, 0.8)
    assert part["drafting"]["strategy"] == "chain"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "seed": 3, "n": 3, "ignore_eos": False, "max_tokens": 40},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 30, "min_p": 0.01},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": -0.3, "max_tokens": 30},
        {"logit_bias": {"70": 3.5, "71": -100}, "temperature": 0.9},
        {"stop_token_ids": list(range(60, 80)), "min_tokens": 4, "max_tokens": 40},
        {"response_format": {"type": "json_object"}, "ignore_eos": False, "temperature": 1.0},
    ],
    ids=["several", "filters", "penalties", "bias", "stop tokens", "grammar"],
)
def test_answers_are_made_again_from_their_receipts(orthrus, elsewhere, fields):
    bodies = [chat(**{"seed": 9} | fields, **asking(strategy)) for strategy in STRATEGIES]
    for answer in run(answers, orthrus, CHAT, *bodies):
        receipt = received(answer)
        check_versions(receipt)
        check_model(elsewhere, receipt)
        checked = verify(elsewhere, receipt)
        assert [each.position for each in checked] == [None] * fields.get("n", 1)
        assert [each.text for each in checked] == [c["message"]["content"] for c in answer["choices"]]


def test_compact_json_is_part_of_a_receipt(orthrus, elsewhere):
    body = chat(
        seed=9, response_format={"type": "json_object"}, ignore_eos=False, max_tokens=60, temperature=1.0
    )
    (answer,) = run(answers, orthrus, CHAT, body | asking(compact_json=True))
    checked = verify(elsewhere, received(answer))
    assert [each.position for each in checked] == [None]
    assert [each.text for each in checked] == [c["message"]["content"] for c in answer["choices"]]


def test_a_stop_string_and_several_prompts(orthrus, elsewhere):
    (plain,) = run(answers, orthrus, TEXT, text("Hello", max_tokens=40))
    stop = plain["choices"][0]["text"][10:12]
    body = text(["Hello", "Goodbye"], max_tokens=40, stop=[stop], n=2, **asking())
    (answer,) = run(answers, orthrus, TEXT, body)
    assert answer["choices"][0]["finish_reason"] == "stop"
    checked = verify(elsewhere, received(answer))
    assert [each.position for each in checked] == [None] * 4
    assert [each.text for each in checked] == [c["text"] for c in answer["choices"]]


def test_an_answer_that_a_deadline_cut_is_made_as_far_as_it_came(elsewhere):
    slow = byte_orthrus()
    step = slow.engine.step

    def wait_and_step():
        import time

        time.sleep(0.02)
        step()

    slow.engine.step = wait_and_step
    (answer,) = run(
        lambda: answers(slow, TEXT, text("Hi", max_tokens=200, min_tokens=150, **asking("ar")), timeout=0.3)
    )
    assert answer["metrics"]["orthrus"]["finish_reasons"] == ["deadline"]
    (checked,) = verify(elsewhere, received(answer))
    assert checked.position is None
    assert checked.text == answer["choices"][0]["text"]


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_a_stream_has_its_receipt_in_its_last_chunk(orthrus, elsewhere, options):
    async def check():
        async with serving(orthrus) as client:
            return events(
                await client.post(
                    CHAT, json=chat(stream=True, temperature=1.0, seed=2, **options, **asking())
                )
            )

    *others, last = run(check)
    assert all("metrics" not in each for each in others)
    (checked,) = verify(elsewhere, received(last))
    said = "".join(e["choices"][0]["delta"].get("content", "") for e in others if e["choices"])
    assert (checked.position, checked.text) == (None, said)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 12}),
    ],
)
def test_other_interfaces_give_receipts_too(orthrus, elsewhere, path, body):
    async def check():
        async with serving(orthrus) as client:
            whole = (await client.post(path, json=body | asking())).json()
            stream = (await client.post(path, json=body | asking() | {"stream": True})).text
        return whole, [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: {")]

    whole, pieces = run(check)
    last = next(piece for piece in reversed(pieces) if "receipt" in json.dumps(piece))
    for told in (whole, last):
        receipt = received(told)
        assert receipt.texts[0].prompt_ids == elsewhere.base.encode_prompt(
            [{"role": "user", "content": "Hi"}]
        )
        assert [each.position for each in verify(elsewhere, receipt)] == [None]


def test_a_change_of_a_token_is_found_and_placed(orthrus, elsewhere):
    (answer,) = run(answers, orthrus, CHAT, chat(**asking()))
    part = answer["metrics"]["orthrus"]["receipt"]["texts"][0]
    right = part["token_ids"][7]
    part["token_ids"][7] = right + 1
    with pytest.raises(UserInputError, match="another digest"):
        received(answer)
    # Somebody may change that, too.
    part["digest"] = digest(part["token_ids"])
    (checked,) = verify(elsewhere, received(answer))
    assert (checked.position, checked.plain_token, checked.our_token) == (7, right, right + 1)
    assert checked.verdict == "broken rule"


def test_an_answer_that_was_cut_by_somebody_else_is_no_whole_one(orthrus, elsewhere):
    fields = {"stop_token_ids": list(range(60, 80)), "min_tokens": 4, "max_tokens": 40}
    (answer,) = run(answers, orthrus, CHAT, chat(**fields, **asking()))
    part = answer["metrics"]["orthrus"]["receipt"]["texts"][0]
    assert part["finish_reason"] == "stop"
    part["token_ids"] = part["token_ids"][:-1]
    part["digest"] = digest(part["token_ids"])
    (checked,) = verify(elsewhere, received(answer))
    assert (checked.position, checked.our_token) == (len(part["token_ids"]), None)


@pytest.fixture(scope="module")
def sound(elsewhere):
    (answer,) = run(answers, elsewhere, CHAT, chat(**asking()))
    return find_receipt(answer)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("kind",), "orthrus-audit", "no receipt"),
        (("format_version",), 2, "format 2"),
        (("texts",), [], "no text"),
        (("texts",), None, "damaged"),
        (("texts", 0, "settings", "temperature"), -1, "temperature"),
        (("texts", 0, "settings", "seed"), None, "seed"),
        (("texts", 0, "settings", "stop"), [""], "stop string"),
        (("texts", 0, "settings", "grammar"), {"kind": "poem"}, "poem"),
        (("texts", 0, "settings", "logit_bias"), {"x": 1}, "damaged"),
        (("texts", 0, "drafting", "strategy"), "magic", "magic"),
        (("texts", 0, "prompt_ids"), [1, 2], "prompt_digest"),
        (("texts", 0, "token_ids"), "abc", "token_ids"),
        (("texts", 0, "token_ids"), [True], "token_ids"),
        (("model", "dtype"), 16, "damaged"),
        (("model",), "tiny", "damaged"),
    ],
)
def test_what_is_no_sound_receipt_is_refused(sound, place, value, told):
    wrong = copy.deepcopy(sound)
    part = wrong
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    with pytest.raises(UserInputError, match=told):
        read_receipt(wrong)


@pytest.mark.parametrize("wrong", [[], 3, None, "receipt", {"metrics": {"orthrus": []}}])
def test_what_holds_no_receipt_is_refused(wrong):
    with pytest.raises(UserInputError):
        read_receipt(find_receipt(wrong))


def test_other_versions_and_other_models_are_refused(sound, elsewhere):
    receipt = read_receipt(sound)
    other = copy.deepcopy(sound)
    other["versions"]["torch"] = "1.0"
    with pytest.raises(UserInputError, match=r"torch 1\.0, here is"):
        check_versions(read_receipt(other))
    for name, value in (("base_fingerprint", "blake2b:00"), ("dtype", "bfloat16"), ("quantised", "int4")):
        other = copy.deepcopy(sound)
        other["model"][name] = value
        with pytest.raises(UserInputError, match=value):
            check_model(elsewhere, read_receipt(other))
    check_model(elsewhere, receipt)
    other = copy.deepcopy(sound)
    other["texts"][0]["token_ids"][0] = 10**6
    other["texts"][0]["digest"] = digest(other["texts"][0]["token_ids"])
    with pytest.raises(UserInputError, match="1000000"):
        check_model(elsewhere, read_receipt(other))


def test_digests_tell_lists_apart():
    assert len({digest(ids) for ids in ([], [1], [12], [1, 2], [2, 1])}) == 5
    assert make_receipt({}, [])["texts"] == []
