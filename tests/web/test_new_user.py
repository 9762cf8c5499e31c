"""The task of a new user: find the lesion in the sample scan, tell how sure the program is, print it."""

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import affines
from playwright.sync_api import Page, expect

from app.sample import make_sample
from tests.web.test_viewer import position

# Milliseconds. The shipped bundle needs half a minute on two idle cores.
ANALYSIS = 300_000


def test_the_lesion_of_the_sample_is_found_judged_and_printed(page: Page, url: str, tmp_path: Path) -> None:
    truth = nib.Nifti1Image.from_filename(make_sample(tmp_path).truth)
    centre = affines.apply_affine(truth.affine, np.argwhere(np.asarray(truth.dataobj))).mean(axis=0)

    page.goto(url)
    page.get_by_role("button", name="Try the sample scan").click()
    row = page.locator("#scans tr", has=page.get_by_role("link", name="sample scan"))
    expect(row.locator("progress")).to_be_visible()
    page.keyboard.press("Enter")
    page.wait_for_url("**/scans/*")
    expect(page.locator("#progress progress")).to_be_visible()
    page.wait_for_selector("body[data-ready]", timeout=ANALYSIS)
    # The surest finding is chosen at the start.
    np.testing.assert_allclose(position(page), centre, atol=3)
    expect(page.locator("#finding-detail")).to_contain_text("clear")
    expect(page.locator("#certainty")).to_contain_text("Within the healthy range")
    page.get_by_role("link", name="Print").click()
    page.wait_for_selector("body[data-ready]")
    expect(page.locator("#findings tr").first).to_contain_text("clear")
