"""The race in a browser: two answers, one clock, a verdict."""

import json
import re
import shlex

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

RACED = 60_000


def race(page: Page, prompt: str = "Say something", tokens: int = 24) -> None:
    """From an empty page to the verdict."""
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Race").click()
    expect(page.locator("#verdict")).to_be_visible(timeout=RACED)


def draft_always(page: Page) -> list[str]:
    """`auto` drafts where that pays, and with a tiny model it seldom does: the server gets `chain` instead.

    Returns a list that its answers come into.
    """
    answers: list[str] = []

    def change(route: Route) -> None:
        asked = route.request.post_data or ""
        if '"auto"' not in asked:
            return route.continue_()
        found = route.fetch(post_data=asked.replace('"auto"', '"chain"'))
        answers.append(found.text())
        return route.fulfill(response=found)

    page.route("**/v1/chat/completions", change)
    return answers


def test_both_answers_are_shown_and_are_the_same(page: Page, url: str) -> None:
    page.goto(url)
    race(page)
    plain, auto = (page.locator(f"#{lane}-text").text_content() for lane in ("plain", "auto"))
    assert plain == auto
    assert plain
    expect(page.locator("#found")).to_have_text("Identical: all 24 tokens are the same.")
    expect(page.get_by_role("status")).to_contain_text("Identical")
    expect(page.locator("#plain-tokens")).to_have_text("24")
    expect(page.locator("#auto-tokens")).to_have_text("24")
    expect(page.locator("#plain-passes")).to_have_text("24")
    expect(page.locator("#plain-ratio")).to_have_text("1.00")
    assert float(page.locator("#auto-speed").text_content() or 0) > 0
    notes = page.locator("#notes").text_content() or ""
    assert notes.startswith("tiny, float32, ")
    assert "seed 0" in notes
    expect(page.get_by_role("button", name="Replay")).to_be_visible()


def test_drafts_are_marked_and_the_chart_shows_each_cycle(page: Page, url: str) -> None:
    answers = draft_always(page)
    page.goto(url)
    race(page, "abc abc abc", 40)
    events = [json.loads(line[6:]) for line in answers[-1].splitlines() if line.startswith("data: {")]
    records = [choice["orthrus"] for event in events for choice in event["choices"] if "orthrus" in choice]
    drafts = [token["draft"] for record in records for token in record["tokens"]]
    assert any(drafts), "nothing was drafted"
    assert page.locator("#auto-text .draft").count() > 0
    assert page.locator("#plain-text .draft").count() == 0
    assert page.locator("#auto-text .missed").count() == sum(
        record["num_drafted"] > sum(token["draft"] for token in record["tokens"]) for record in records
    )
    struck = ["".join(token["text"] for token in record["rejected"]) for record in records]
    assert any(struck)
    shown = page.locator("#auto-text .missed").evaluate_all("all => all.map(each => each.dataset.struck)")
    assert shown == [
        re.sub(r"\s+", " ", text.replace("\n", "↵"))
        for text, record in zip(struck, records, strict=True)
        if record["num_drafted"] > sum(token["draft"] for token in record["tokens"])
    ]
    heights = page.locator("#chart rect.drafted").evaluate_all(
        "all => all.map(each => Number(each.getAttribute('height')))"
    )
    assert heights == [sum(token["draft"] for token in record["tokens"]) for record in records]
    # A mark that colour alone would make is none for many readers.
    assert "underline" in page.locator("#auto-text .draft").first.evaluate(
        "each => getComputedStyle(each).textDecorationLine"
    )
    page.get_by_label("Mark drafts").uncheck()
    assert (
        page.locator("#auto-text .draft").first.evaluate("each => getComputedStyle(each).textDecorationLine")
        == "none"
    )


def test_the_command_of_the_verdict_gives_the_same_text(page: Page, url: str) -> None:
    page.goto(url)
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("5")
    race(page, 'It\'s "quoted"\nand broken', 30)
    page.get_by_text("The same by hand").click()
    words = shlex.split(page.locator("#curl").text_content() or "")
    assert words[0] == "curl"
    answer = httpx.post(words[1], headers=dict([words[3].split(": ")]), content=words[5], timeout=60)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == page.locator("#auto-text").text_content() == page.locator("#plain-text").text_content()


def test_a_difference_is_found(page: Page, url: str) -> None:
    def falsify(route: Route) -> None:
        found = route.fetch()
        body = json.loads(route.request.post_data or "{}")
        if body["orthrus"]["strategy"] != "auto" or body["max_tokens"] == 1:
            return route.fulfill(response=found)
        lines = found.text().split("\n")
        place = [i for i, line in enumerate(lines) if '"tokens":[' in line][3]
        event = json.loads(lines[place][6:])
        event["choices"][0]["orthrus"]["tokens"][0] |= {"id": 1, "text": "<wrong>"}
        lines[place] = "data: " + json.dumps(event)
        return route.fulfill(response=found, body="\n".join(lines))

    page.goto(url)
    page.route("**/v1/chat/completions", falsify)
    race(page)
    expect(page.locator("#found")).to_contain_text("Different from token ")
    expect(page.locator("#found")).to_contain_text('"<wrong>" with drafts.')
    expect(page.locator("#notes")).to_contain_text("orthrus audit")


def test_shared_times_are_called_so(page: Page, url: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
    }
    page.goto(url)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as other:
        assert other.status_code == 200
        race(page)
    expect(page.locator("#notes")).to_contain_text("the times are shared")
    race(page)
    expect(page.locator("#notes")).not_to_contain_text("the times are shared")


def test_stop_ends_the_race(page: Page, url: str) -> None:
    page.goto(url)
    page.get_by_label("Tokens at most").fill("900")
    page.get_by_role("button", name="Race").click()
    expect(page.get_by_role("status")).to_contain_text("Plain decoding, alone. Writing")
    page.locator("#race-form .stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.locator("#verdict")).to_be_hidden()
    race(page)
    expect(page.locator("#found")).to_contain_text("Identical")


def test_the_clock_can_be_moved(page: Page, url: str) -> None:
    page.goto(url)
    race(page)
    whole = page.locator("#auto-text").text_content()
    bars = page.locator("#chart rect").count()
    page.get_by_label("Clock").focus()
    page.keyboard.press("Home")
    expect(page.locator("#auto-text")).to_have_text("")
    expect(page.locator("#plain-tokens")).to_have_text("–")
    page.keyboard.press("End")
    expect(page.locator("#plain-tokens")).to_have_text("24")
    assert page.locator("#auto-text").text_content() == whole
    assert page.locator("#chart rect").count() == bars


@pytest.mark.parametrize("page", [{"reduced_motion": "reduce"}], indirect=True)
def test_whoever_wants_no_motion_sees_the_end_at_once(page: Page, url: str) -> None:
    draft_always(page)
    page.goto(url)
    page.evaluate(
        "() => { window.frames_ = 0; requestAnimationFrame = () => { window.frames_++; return 1; }; }"
    )
    race(page)
    assert page.evaluate("() => window.frames_") == 0
    expect(page.locator("#auto-tokens")).to_have_text("24")
    names = page.locator("#auto-text *").evaluate_all(
        "all => all.map(e => getComputedStyle(e).animationName)"
    )
    assert set(names) == {"none"}


def test_a_server_that_is_gone_is_one_sentence(page: Page, url: str) -> None:
    page.goto(url)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Race").click()
    expect(page.get_by_role("status")).to_have_text("The server cannot be reached: is it running?")


def test_a_wrong_number_asks_nothing_of_the_server(page: Page, url: str) -> None:
    page.goto(url)
    asked: list[str] = []
    page.on("request", lambda each: asked.append(each.url))
    page.get_by_label("Tokens at most").fill("0")
    page.get_by_role("button", name="Race").click()
    expect(page.locator("#tokens:invalid")).to_be_focused()
    assert asked == []
