"""The chat in a browser, and the API key, which both tabs share."""

import json
from typing import Any

from playwright.sync_api import Page, Request, expect

from .conftest import KEY


def open_chat(page: Page, url: str, tokens: int = 24) -> None:
    page.goto(url)
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_role("tab", name="Chat").click()


def send(page: Page, text: str) -> dict[str, Any]:
    """Types a message and sends it; returns what the server was asked."""
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_label("Message").fill(text)
        page.get_by_label("Message").press("Enter")
    request: Request = asked.value
    return json.loads(request.post_data or "")


def test_two_turns(page: Page, url: str) -> None:
    open_chat(page, url)
    first = send(page, "Hello <b>there</b>")
    expect(page.get_by_role("status")).to_have_text("Answered: 24 tokens.")
    assert first["messages"] == [{"role": "user", "content": "Hello <b>there</b>"}]
    assert (first["max_tokens"], first["temperature"], first["seed"]) == (24, 0, 0)
    answer = page.locator("article.answered div").text_content()
    second = send(page, "Go on")
    expect(page.locator("article.answered p").nth(1)).to_contain_text("24 tokens")
    expect(page.get_by_role("status")).to_have_text("Answered: 24 tokens.")
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Go on"},
    ]
    assert page.locator("article").count() == 4
    expect(page.locator("article.asked div").first).to_have_text("Hello <b>there</b>")
    assert page.locator("article b").count() == 0
    for figure in ("tokens/s", "passes", "tokens a pass", "as many tokens as were allowed"):
        expect(page.locator("article.answered p").first).to_contain_text(figure)
    box = page.locator("#log").evaluate("log => [log.scrollTop + log.clientHeight, log.scrollHeight]")
    assert box[0] >= box[1] - 1, "the log follows its end"


def test_stop_keeps_what_has_come(page: Page, url: str) -> None:
    open_chat(page, url, 900)
    send(page, "Tell me a lot")
    expect(page.get_by_role("status")).to_have_text("Writing.")
    expect(page.locator("article.answered div")).not_to_be_empty()
    page.locator("#chat-form .stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.locator("article.answered p")).to_contain_text("stopped")
    kept = page.locator("article.answered div").text_content()
    page.get_by_label("Tokens at most").fill("8")
    asked = send(page, "And?")
    assert asked["messages"][1] == {"role": "assistant", "content": kept}
    expect(page.get_by_role("status")).to_have_text("Answered: 8 tokens.")


def test_clear_forgets_all_turns(page: Page, url: str) -> None:
    open_chat(page, url, 8)
    send(page, "One")
    expect(page.get_by_role("status")).to_have_text("Answered: 8 tokens.")
    page.get_by_role("button", name="Clear").click()
    assert page.locator("article").count() == 0
    expect(page.get_by_label("Message")).to_be_focused()
    assert len(send(page, "Two")["messages"]) == 1


def test_a_failed_turn_gives_the_message_back(page: Page, url: str) -> None:
    open_chat(page, url)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "Keep me")
    expect(page.get_by_role("status")).to_have_text("The server cannot be reached: is it running?")
    expect(page.get_by_label("Message")).to_have_value("Keep me")
    assert page.locator("article").count() == 0


def test_a_wrong_key_shows_the_servers_sentence_and_the_right_one_opens(page: Page, locked_url: str) -> None:
    page.goto(locked_url)
    expect(page.locator("#about")).to_be_empty()
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Race").click()
    told = "A valid API key is needed: send it as 'Authorization: Bearer KEY'."
    expect(page.get_by_role("status")).to_have_text(told)
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#about")).to_have_text("tiny")
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_role("button", name="Race").click()
    expect(page.locator("#found")).to_contain_text("Identical")
    shown = page.content() + (page.locator("#curl").text_content() or "")
    assert KEY not in shown, "a key that is shown is a key that is copied"
    assert "Bearer $ORTHRUS_API_KEY" in shown
    assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.get_by_role("tab", name="Chat").click()
    send(page, "Hi")
    expect(page.get_by_role("status")).to_have_text("Answered: 8 tokens.")
