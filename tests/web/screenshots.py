"""Pictures of the dashboard for docs/dashboard: `python -m tests.web.screenshots`.

It starts a service with the shipped bundles in a temporary folder, analyses the sample scan, and takes one picture of
each main state. It takes a few minutes on two cores, because the graphics processor is software.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page

from tests.api.service_process import CHECKOUT, run_service
from tests.web.browser import TIMEOUT, chromium, open_viewer, wait_until_still
from tests.web.conftest import COMMAND

FOLDER = CHECKOUT / "docs" / "dashboard"
SIZE = (1280, 800)
# Small files: a palette of 256 entries, so many of them for pixels whose channels differ by more than `CHROMA`.
COLOURS, CHROMA = 176, 12


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="counterpart-pictures-") as scratch:
        log = Path(scratch) / "log"
        with run_service(Path(scratch) / "store", log, COMMAND) as service, chromium() as browser:
            page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
            page.set_default_timeout(4 * TIMEOUT)
            url = f"http://127.0.0.1:{service.port}"
            job = _take_worklist(page, url)
            open_viewer(page, f"{url}/scans/{job}")
            wait_until_still(page.locator("#stage"))
            _save(page, "viewer")
            page.get_by_role("button", name="right").first.click()
            _take_comparison(page, "s", "side", "side-by-side")
            _take_comparison(page, "x", "swipe", "swipe")
            open_viewer(page, f"{url}/scans/{job}/print")
            page.set_viewport_size({"width": 860, "height": 1200})
            _save(page, "print")
            page.set_viewport_size({"width": SIZE[0], "height": SIZE[1]})
            page.goto(f"{url}/models#t1-1.9.0")
            page.locator("#card h2").wait_for()
            _save(page, "models")


def _take_worklist(page: Page, url: str) -> str:
    """Send the sample, a second copy that waits, and a file that is no image. Return the finished job."""
    page.goto(url)
    page.get_by_role("button", name="Try the sample scan").click()
    row = page.locator("#scans tr").first
    row.locator(".is-succeeded").wait_for()
    row.locator("img").evaluate("image => image.decode()")
    job = str(row.get_attribute("data-id"))
    scan = page.request.get(f"{url}/v1/scans/{job}/image.nii.gz").body()
    for name, model in (
        ("head.nii.gz", "headct-1.3.1"),
        ("follow-up.nii.gz", "t1-1.9.0"),
        ("second.nii.gz", "t1-1.9.0"),
    ):
        page.locator("#send-model").select_option(model)
        page.set_input_files("#files", {"name": name, "mimeType": "application/gzip", "buffer": scan})
        page.get_by_role("link", name=name, exact=True).wait_for()
    page.set_input_files("#files", {"name": "letter.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7 " * 90})
    page.locator("#uploads .problem").wait_for()
    page.wait_for_timeout(4000)
    _save(page, "worklist")
    return job


def _take_comparison(page: Page, key: str, mode: str, name: str) -> None:
    page.locator("#title").click()
    page.keyboard.press(key)
    page.wait_for_selector(f"#stage[data-compare={mode}]")
    wait_until_still(page.locator("#stage"))
    _save(page, name)
    page.keyboard.press("Escape")


def _save(page: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot(timeout=4 * TIMEOUT))).convert("RGB")
    path = FOLDER / f"{name}.png"
    picture.quantize(palette=_palette(picture), dither=Image.Dither.NONE).save(path, optimize=True)
    sys.stdout.write(f"{path.relative_to(CHECKOUT)}: {path.stat().st_size // 1000} kB\n")


def _palette(picture: Image.Image) -> Image.Image:
    """Return a palette of greys and of the picture's own colours. One for all pixels would have few colours."""
    pixels = np.asarray(picture).reshape(-1, 3)
    coloured = pixels[np.ptp(pixels.astype(int), axis=1) > CHROMA]
    colours = Image.fromarray(coloured[None]).quantize(COLOURS).getpalette() or []
    greys = np.linspace(0, 255, 256 - COLOURS).astype(int)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*colours[: 3 * COLOURS], *np.repeat(greys, 3).tolist()])
    return palette


if __name__ == "__main__":
    main()
