"""Chromium of the system with software WebGL 2, and a page that records what a page of the dashboard must not do."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
# Root has no sandbox of its own, and shared memory of containers is small.
ARGUMENTS = (
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
)
# Milliseconds. The volume is drawn by the CPU, which other tests may use as well.
TIMEOUT = 60_000
POLL = 80
RECORD_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`policy violation: ${event.violatedDirective} ${event.blockedURI}`));
"""

Pixels = npt.NDArray[np.int16]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Recorder:
    """Record of the pages of one context.

    Attributes
    ----------
    urls : list of str
        Every request.
    faults : list of str
        Errors of scripts and violations of the content security policy.
    """

    urls: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        """Record all pages of a context."""
        context.add_init_script(RECORD_VIOLATIONS)
        context.on("request", lambda request: self.urls.append(request.url))
        context.on("weberror", lambda error: self.faults.append(str(error.error)))
        context.on("console", lambda message: self._keep(message.text))

    def _keep(self, text: str) -> None:
        if text.startswith("policy violation") or "Content Security Policy" in text:
            self.faults.append(text)

    def foreign(self, origin: str) -> list[str]:
        """Return the requests that left an origin. `data:` and `blob:` stay in the browser."""
        return [url for url in self.urls if not url.startswith((f"{origin}/", "data:", f"blob:{origin}/"))]


def pixels(locator: Locator) -> Pixels:
    """Return what the browser shows of an element, (rows, columns, 3)."""
    with Image.open(io.BytesIO(locator.screenshot(timeout=TIMEOUT))) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


def wait_for_change(locator: Locator, before: Pixels) -> Pixels:
    """Return the picture of an element as soon as it differs from an earlier one and stays the same."""
    return _poll(locator, lambda now, last: differs(now, before) and np.array_equal(now, last))


def wait_until_still(locator: Locator) -> Pixels:
    """Return the picture of an element as soon as two in sequence are equal."""
    return _poll(locator, np.array_equal)


def differs(one: Pixels, other: Pixels) -> bool:
    """Return whether two pictures differ visibly: in one pixel by more than rounding."""
    return one.shape != other.shape or bool((np.abs(one - other).max(axis=2) > 8).any())


def _poll(locator: Locator, is_enough: Callable[[Pixels, Pixels], bool]) -> Pixels:
    last = pixels(locator)
    for _ in range(TIMEOUT // POLL):
        locator.page.wait_for_timeout(POLL)
        now = pixels(locator)
        if is_enough(now, last):
            return now
        last = now
    raise AssertionError("the picture did not change")


def open_viewer(page: Page, url: str) -> None:
    """Open a viewer and wait until its volumes are drawn."""
    page.goto(url)
    page.wait_for_selector("body[data-ready]", timeout=TIMEOUT)
