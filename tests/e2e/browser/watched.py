"""Pages whose console, requests and violations are written down from the first byte on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

from tests.e2e.browser.installed import axe_core

_NOTE_VIOLATIONS = """
window.violationsSeen = [];
addEventListener("securitypolicyviolation", event => {
    window.violationsSeen.push(`${event.effectiveDirective} ${event.blockedURI} ${event.sample}`);
}, true);
"""
"""Of the Content-Security-Policy. It runs before any script of the page."""


@dataclass(eq=False)
class Watched:
    """A page of one server. `expected` is a pattern of console errors that belong to what is tested."""

    page: Page
    host: str
    expected: str | None
    console: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.wrong.append(f"uncaught {error}"))
        self.page.on("request", self._note_request)
        self.page.on("crash", lambda _: self.wrong.append("the page crashed"))
        self.page.add_init_script(_NOTE_VIOLATIONS)

    def problems(self) -> list[str]:
        """What no page should do."""
        violations: list[str] = self.page.evaluate("window.violationsSeen ?? []")
        return self.wrong + [f"violation of the policy: {violation}" for violation in violations]

    def story(self) -> str:
        return "\n".join([f"--- {self.page.url}", "console:", *self.console, "wrong:", *self.problems()])

    def posted(self, path: str) -> list[dict[str, Any]]:
        """The JSON bodies that the page sent to `path`, in their order."""
        mine = [r for r in self.requests if r.method == "POST" and urlsplit(r.url).path == path]
        return [json.loads(request.post_data or "null") for request in mine]

    def accessibility_faults(self, within: str = "html") -> list[str]:
        """What axe-core finds in the element that `within` selects.

        Its script is run by the debugger, so that the page's policy stays as strict as it is.
        """
        self.page.evaluate(f"() => {{ {axe_core().read_text(encoding='utf-8')} }}")
        found: list[dict[str, Any]] = self.page.evaluate(
            "part => axe.run(part).then(result => result.violations)", within
        )
        return [
            f"{rule['id']}: {node['target']} {node['html'][:150]} {node['failureSummary']}"
            for rule in found
            for node in rule["nodes"]
        ]

    def overflow(self) -> list[str]:
        """Elements that stick out of the page to the right, if it can be moved sideways."""
        found: list[str] = self.page.evaluate("""() => {
            const root = document.documentElement, width = root.clientWidth;
            if (root.scrollWidth <= width) return [];
            return [...document.querySelectorAll("body *")]
                .filter(element => element.getBoundingClientRect().right > width + 0.5)
                .map(element => element.outerHTML.slice(0, 150));
        }""")
        return found

    def _note_console(self, message: ConsoleMessage) -> None:
        line = f"{message.type}: {message.text} ({message.location.get('url', '')})"
        self.console.append(line)
        if message.type == "error" and not (self.expected and re.search(self.expected, line)):
            self.wrong.append(line)

    def _note_request(self, request: Request) -> None:
        self.requests.append(request)
        if urlsplit(request.url).netloc != self.host:
            self.wrong.append(f"a request to {request.url}")


@dataclass(frozen=True)
class Pages:
    """Opens pages of a test, and looks at them when it ends."""

    browser: Browser
    folder: Path
    """For pictures of pages of a failed test."""
    patience_ms: int
    opened: list[Watched] = field(default_factory=list)

    def open(self, url: str, *, expected: str | None = None, **context: Any) -> Watched:
        """`url` in a profile of its own. `context` as Playwright's new_context has it: viewport, color_scheme, …"""
        profile: BrowserContext = self.browser.new_context(**context)
        profile.set_default_timeout(self.patience_ms)
        watched = Watched(profile.new_page(), urlsplit(url).netloc, expected)
        self.opened.append(watched)
        watched.listen()
        watched.page.goto(url)
        return watched

    def close(self, *, failed: bool, say: Callable[[str], None]) -> None:
        """Raises AssertionError when a page did what none should, unless the test has `failed` anyway."""
        problems = [problem for watched in self.opened for problem in watched.problems()]
        if failed or problems:
            for number, watched in enumerate(self.opened):
                say(watched.story())
                picture = self.folder / f"page-{number}.png"
                watched.page.screenshot(path=picture, full_page=True)
                say(f"picture: {picture}")
        for watched in self.opened:
            watched.page.context.close()
        assert failed or not problems, "\n".join(problems)
