"""Everything can be reached and worked without a mouse."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.e2e.browser.asking import last_answer, put_controls, send, shown_trace, wait_done
from tests.e2e.browser.watched import Pages
from tests.e2e.running import Server

NAME_JS = """element => element === document.body ? "" :
    element.id || element.outerHTML.replace(/ (class|style|data-value)="[^"]*"/g, "").slice(0, 120)"""

CONTROLS_JS = f"""() => [...document.querySelectorAll(
        "a[href], button, input, select, textarea, summary, [tabindex='0']"
    )]
    .filter(element => !element.disabled && element.checkVisibility() && element.tabIndex >= 0)
    .map({NAME_JS})"""


def focused(page: Page) -> str:
    name: str = page.evaluate(f"({NAME_JS})(document.activeElement)")
    return name


def test_tab_reaches_every_control(pages: Pages, server: Server) -> None:
    page = pages.open(server.url).page
    expect(page.locator("#heatmap [role=gridcell][data-expert]")).to_have_count(24)
    put_controls(page)
    send(page, "Which experts?")
    wait_done(last_answer(page, "plain")).locator("[data-token]").first.click()
    controls: list[str] = page.evaluate(CONTROLS_JS)
    assert {"heatmap", "message", "send", "experts-per-token", "capacity", "compare", "layer"} < set(controls)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0); getSelection().removeAllRanges()")
    page.locator("header").first.click(position={"x": 1, "y": 1})
    reached = []
    for _ in range(len(controls) + 10):
        page.keyboard.press("Tab")
        reached.append(focused(page))
        if reached[-1]:
            assert page.evaluate(_SHOWS_FOCUS), f"{reached[-1]} has the focus and does not show it"
    assert set(controls) <= set(reached), set(controls) - set(reached)


_SHOWS_FOCUS = """() => {
    const shows = element => {
        const style = getComputedStyle(element);
        return (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0) || style.boxShadow !== "none";
    };
    const element = document.activeElement;
    const inside = document.getElementById(element.getAttribute("aria-activedescendant"));
    return shows(element) || (inside !== null && shows(inside));
}"""


def test_a_whole_conversation_by_keys(pages: Pages, server: Server) -> None:
    page = pages.open(server.url).page
    put_controls(page)
    message = page.get_by_label("Message", exact=True)
    message.focus()
    page.keyboard.type("Which experts?")
    page.keyboard.press("Enter")
    answer = wait_done(last_answer(page, "plain"))
    answer.get_by_role("listbox").evaluate(_FOCUS)
    page.keyboard.press("Enter")
    first = shown_trace(page)
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert shown_trace(page) != first
    chosen = answer.locator('[data-token][aria-selected="true"]')
    expect(chosen).to_have_count(1)
    expect(chosen).to_have_attribute("data-token", "5")


_FOCUS = """box => (box.tabIndex >= 0 ? box : box.querySelector("[tabindex='0']")).focus()"""
"""The list is one stop of the Tab key: itself, or one of its tokens."""


def test_the_heatmap_by_keys(pages: Pages, server: Server) -> None:
    page = pages.open(server.url).page
    expect(page.locator("#heatmap [role=gridcell][data-expert]")).to_have_count(24)
    page.locator("#heatmap").focus()
    values = page.locator("#heatmap-values")
    seen = []
    for key in ("Home", "ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "End"):
        page.keyboard.press(key)
        active = page.locator("#heatmap").get_attribute("aria-activedescendant")
        cell = page.locator(f"[id='{active}']")
        seen.append((cell.get_attribute("data-layer"), cell.get_attribute("data-expert")))
        assert cell.get_attribute("aria-label")
        expect(values).to_have_text(cell.get_attribute("aria-label") or "")
    assert len(set(seen)) >= 4


def test_escape_closes_the_trace(pages: Pages, server: Server) -> None:
    page = pages.open(server.url).page
    put_controls(page)
    send(page, "Which experts?")
    wait_done(last_answer(page, "plain")).locator("[data-token]").first.click()
    expect(page.locator("#trace")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#trace")).to_be_hidden()
