"""The page for everybody: keyboard, screen reader, small screens, light and dark."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from .test_chat import send
from .test_race import race

AXE = Path(os.environ.get("AXE", ""))
LOOKS = [
    {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    for scheme in ("light", "dark")
    for width in (320, 1280)
]


def focused(page: Page) -> str:
    return page.evaluate("() => document.activeElement.id || document.activeElement.textContent")


def tab_to(page: Page, name: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page) == name:
            return
    raise AssertionError(f"Tab never came to {name}")


def test_all_of_it_by_keyboard(page: Page, url: str) -> None:
    page.goto(url)
    tab_to(page, "race-tab")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "chat-tab"
    expect(page.get_by_label("Message")).to_be_visible()
    page.keyboard.press("Home")
    expect(page.get_by_label("Prompt")).to_be_visible()
    tab_to(page, "tokens")
    page.keyboard.type("24")
    tab_to(page, "prompt")
    page.keyboard.type("By hand")
    tab_to(page, "go")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_be_visible()
    assert focused(page) == "go", "the focus stays where it was"
    tab_to(page, "clock")
    page.keyboard.press("Home")
    expect(page.locator("#auto-text")).to_have_text("")
    tab_to(page, "The same by hand")
    page.keyboard.press("Enter")
    expect(page.locator("#curl")).to_be_visible()

    page.locator("#race-tab").focus()
    page.keyboard.press("ArrowLeft")
    tab_to(page, "tokens")
    page.keyboard.type("900")
    tab_to(page, "message")
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Writing.")
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.locator("article.asked div")).to_have_text("One line\nand another")
    assert focused(page) == "message"


def test_one_line_speaks_and_it_says_little(page: Page, url: str) -> None:
    page.goto(url)
    assert page.locator("[aria-live=polite], [aria-live=assertive], [role=alert]").count() == 1
    page.evaluate(
        """() => {
            window.said = [];
            new MutationObserver(() => said.push(document.getElementById("status").textContent))
                .observe(document.getElementById("status"), { childList: true });
        }"""
    )
    race(page, tokens=80)
    said = page.evaluate("() => said")
    assert len(said) <= 12, "no token is announced"
    for part in (
        "Queued.",
        "Plain decoding, alone. Writing.",
        "Orthrus, alone. Writing.",
    ):
        assert any(each.startswith(part) for each in said), part
    assert said[-1].startswith("Identical")


@pytest.mark.parametrize(
    "page", LOOKS, indirect=True, ids=lambda each: f"{each['color_scheme']}-{each['viewport']['width']}"
)
def test_looks(page: Page, url: str) -> None:
    """Nothing scrolls sideways, and axe finds nothing serious: at the start, after a race, in a chat."""
    if not AXE.is_file():
        pytest.skip("axe-core is not there: npm fetches it in make test-web")
    page.goto(url)
    check(page)
    race(page, "A_prompt_of_one_word_that_is_far_too_long_for_a_line_of_a_small_screen")
    page.get_by_text("The same by hand").click()
    check(page)
    page.get_by_role("tab", name="Chat").click()
    send(page, "Hello")
    expect(page.get_by_role("status")).to_contain_text("Answered")
    check(page)


def check(page: Page) -> None:
    width, seen = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert width <= seen, "the page scrolls sideways"
    # Marks that are still settling have colours of their own.
    page.evaluate("() => Promise.all(document.getAnimations().map(each => each.finished))")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run()")
    bad = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"]) for each in bad] == []
    assert len(found["passes"]) > 10
