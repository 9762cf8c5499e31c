"""The viewer: what the layers draw, where the crosshair lands, and what a reader's verdict keeps."""

import gzip
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from app.api.reviews import MAX_NOTE
from tests.api.service_process import RunningService
from tests.support.phantom import LESION_MM
from tests.web.browser import Recorder, differs, open_viewer, pixels, wait_for_change, wait_until_still

SCAN = "#scan-scene"


@pytest.fixture(scope="module")
def shared(browser: Browser) -> Iterator[tuple[Page, Recorder]]:
    """Return one page for the whole module: the start of WebGL in software takes seconds."""
    recorder = Recorder()
    context = browser.new_context(viewport={"width": 1000, "height": 640})
    recorder.watch(context)
    yield context.new_page(), recorder
    context.close()


@pytest.fixture
def viewer(shared: tuple[Page, Recorder], url: str, finished: str) -> Iterator[Page]:
    """Return the viewer of the phantom, in the axial view, with all layers as at the start."""
    page, recorder = shared
    if f"/scans/{finished}" not in page.url:
        open_viewer(page, f"{url}/scans/{finished}")
    page.keyboard.press("Escape")
    for name, value in {"view": "axial", "mask": "outline", "compare": "off"}.items():
        page.locator(f"input[name={name}][value={value}]").check(force=True)
    page.locator("#findings tr").first.click()
    page.locator("#map-opacity").fill("0.4")
    wait_until_still(page.locator(SCAN))
    yield page
    assert recorder.foreign(url) == []
    assert recorder.faults == []


@pytest.fixture(scope="module")
def report(service: RunningService, finished: str) -> dict[str, Any]:
    answer: dict[str, Any] = service.http.get(f"/v1/scans/{finished}/report.json").json()
    return answer


def position(page: Page) -> list[float]:
    return [float(value) for value in str(page.locator("#position").get_attribute("data-mm")).split()]


def test_map_is_drawn_over_the_finding_and_nowhere_else_bright(viewer: Page) -> None:
    scan = viewer.locator(SCAN)
    viewer.locator("#map-opacity").fill("0")
    viewer.locator("input[name=mask][value=off]").check()
    plain = wait_until_still(scan)
    viewer.locator("input[name=mask][value=fill]").check()
    under_mask = np.abs(wait_for_change(scan, plain) - plain).max(axis=2) > 40
    viewer.locator("input[name=mask][value=off]").check()
    viewer.locator("#map-opacity").fill("1")
    drawn = wait_for_change(scan, plain)
    changed = np.abs(drawn - plain).max(axis=2) > 8
    assert under_mask.sum() > 500
    # The fill, the number and the outline mark the finding. The map covers it and is coloured, the scan is grey.
    assert changed[under_mask].mean() > 0.8
    colourfulness = (drawn.max(axis=2) - drawn.min(axis=2))[under_mask & changed]
    assert np.median(colourfulness) > 60
    assert changed[~under_mask].mean() < 0.05


@pytest.mark.parametrize(
    ("slider", "value"),
    [
        ("axial", "20"),
        ("coronal", "20"),
        ("sagittal", "20"),
        ("mask-opacity", "0.2"),
        ("map-opacity", "0.9"),
        ("map-threshold", None),
        ("level", "200"),
        ("width", "100"),
    ],
)
def test_each_slider_changes_what_is_drawn(viewer: Page, slider: str, value: str | None) -> None:
    scan, control = viewer.locator(SCAN), viewer.locator(f"#{slider}")
    before, old = wait_until_still(scan), control.input_value()
    control.fill(value or str(control.get_attribute("max")))
    control.dispatch_event("change")
    wait_for_change(scan, before)
    control.fill(old)
    control.dispatch_event("change")


def test_jump_lands_on_the_finding_in_millimetres(
    viewer: Page, report: dict[str, Any], service: RunningService, finished: str
) -> None:
    viewer.locator("#axial").fill("5")
    (finding,) = report["findings"]
    viewer.locator("#findings tr").first.press("Enter")
    expect(viewer.locator("#position")).to_contain_text(f"finding {finding['label']}")
    np.testing.assert_allclose(position(viewer), finding["centroid_mm"], atol=0.05)
    np.testing.assert_allclose(position(viewer), LESION_MM, atol=3)
    # An independent reader finds the label at that position.
    labels = nib.Nifti1Image.from_bytes(
        gzip.decompress(service.http.get(f"/v1/scans/{finished}/labels.nii.gz").content),
    )
    voxel = np.linalg.inv(labels.affine) @ [*position(viewer), 1]
    assert np.asarray(labels.dataobj)[tuple(np.round(voxel[:3]).astype(int))] == finding["label"]


def test_crosshair_and_text_tell_the_same_position(viewer: Page, report: dict[str, Any]) -> None:
    # In radiological layout the patient's right is on the left of the picture: x grows to the left.
    assert report["findings"][0]["centroid_mm"][0] > 0
    box = viewer.locator(SCAN).bounding_box()
    assert box is not None
    viewer.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    left = position(viewer)
    viewer.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
    assert left[0] > position(viewer)[0]
    viewer.keyboard.press("l")
    viewer.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    assert position(viewer)[0] < 0
    expect(viewer.locator("#convention")).to_have_text("Neurological: R is right")
    viewer.keyboard.press("l")


def test_counterpart_beside_the_scan_follows_its_crosshair(viewer: Page) -> None:
    viewer.keyboard.press("s")
    viewer.wait_for_selector("#stage[data-compare=side]")
    counterpart = viewer.locator("#counterpart-scene")
    before = wait_until_still(counterpart)
    viewer.locator("#axial").fill("12")
    wait_for_change(counterpart, before)
    box = counterpart.bounding_box()
    assert box is not None
    before, at = wait_until_still(viewer.locator(SCAN)), position(viewer)
    viewer.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    wait_for_change(viewer.locator(SCAN), before)
    assert position(viewer) != at


def test_swipe_shows_the_scan_left_and_the_counterpart_right(viewer: Page) -> None:
    stage = viewer.locator("#stage")
    viewer.keyboard.press("x")
    viewer.wait_for_selector("#stage[data-compare=swipe]")
    viewer.locator("#swipe").fill("100")
    only_scan = wait_until_still(stage)
    viewer.locator("#swipe").fill("0")
    only_counterpart = wait_for_change(stage, only_scan)
    viewer.locator("#swipe").fill("50")
    both = wait_for_change(stage, only_counterpart)
    half, margin = both.shape[1] // 2, 40
    rows = slice(60, None)  # below the captions
    assert not differs(both[rows, : half - margin], only_scan[rows, : half - margin])
    assert not differs(both[rows, half + margin :], only_counterpart[rows, half + margin :])


def test_flicker_alternates_and_ends_with_its_key(viewer: Page) -> None:
    viewer.keyboard.press("f")
    viewer.wait_for_selector("#stage[data-compare=flicker][data-shown=counterpart]")
    viewer.wait_for_selector("#stage[data-compare=flicker][data-shown=scan]")
    viewer.keyboard.press("f")
    viewer.wait_for_selector("#stage[data-compare=off]")


def test_flicker_waits_for_a_key_if_motion_is_unwanted(viewer: Page) -> None:
    viewer.emulate_media(reduced_motion="reduce")
    viewer.keyboard.press("f")
    viewer.wait_for_selector("#stage[data-compare=flicker][data-shown=scan]")
    viewer.wait_for_timeout(1500)
    assert viewer.locator("#stage").get_attribute("data-shown") == "scan"
    viewer.locator("#title").click()
    viewer.keyboard.press(" ")
    viewer.wait_for_selector("#stage[data-shown=counterpart]")
    viewer.emulate_media(reduced_motion="no-preference")


def test_a_verdict_is_kept_and_shown_in_the_list(
    viewer: Page, service: RunningService, finished: str, url: str, context: BrowserContext
) -> None:
    result = service.http.get(f"/v1/scans/{finished}/report.json").content
    viewer.locator("#review-note").fill("Beside the ventricle.")
    viewer.locator("#review-reader").fill("reader 1")
    viewer.get_by_role("button", name="right", exact=False).first.click()
    expect(viewer.locator("#findings tr").first).to_contain_text("✓ right")
    (review,) = service.http.get(f"/v1/scans/{finished}/reviews").json()["reviews"]
    assert (review["verdict"], review["note"], review["reader"]) == ("right", "Beside the ventricle.", "reader 1")
    assert service.http.get(f"/v1/scans/{finished}/report.json").content == result
    page = context.new_page()
    page.goto(url)
    expect(page.locator(f'tr[data-id="{finished}"]')).to_contain_text("✓ 1")


def test_a_reader_changes_only_the_own_verdict_and_sees_those_of_the_others(
    page: Page, url: str, service: RunningService, disputed: str
) -> None:
    def verdicts() -> list[tuple[str, str, str]]:
        answer = service.http.get(f"/v1/scans/{disputed}/reviews").json()["reviews"]
        return [(review["reader"], review["verdict"], review["note"]) for review in answer]

    before = verdicts()
    open_viewer(page, f"{url}/scans/{disputed}")
    note, others = page.locator("#review-note"), page.locator("#other-reviews li")
    withdraw = page.get_by_role("button", name="Withdraw")
    page.locator("#review-reader").fill("C")
    expect(others).to_have_text(["unsure by A: Beside the ventricle.", "wrong by B: <b>Motion</b>"])
    expect(page.locator("#findings td").last).to_have_text("✕ wrong, ? unsure")
    expect(note).to_have_value("")
    expect(note).to_have_attribute("maxlength", str(MAX_NOTE))
    expect(page.locator(".verdicts [aria-pressed=true]")).to_have_count(0)
    expect(withdraw).to_have_count(0)

    page.get_by_role("button", name="✓ right").click()
    expect(page.locator("#finding-detail")).to_contain_text("Marked as right by C.")
    assert verdicts() == [*before, ("C", "right", "")]
    withdraw.click()
    expect(withdraw).to_have_count(0)
    expect(others).to_have_count(2)
    assert verdicts() == before

    page.locator("#review-reader").fill("B")
    expect(note).to_have_value("<b>Motion</b>")
    expect(page.locator(".verdicts [aria-pressed=true]")).to_have_text("✕ wrong")
    expect(withdraw).to_be_visible()
    expect(others).to_have_text(["unsure by A: Beside the ventricle."])


def test_the_program_says_how_sure_it_is(viewer: Page, report: dict[str, Any]) -> None:
    ratio = report["findings"][0]["peak_score"] / report["threshold"]
    word = "clear" if ratio >= 1.5 else "doubtful"
    expect(viewer.locator("#finding-detail")).to_contain_text(word)
    expect(viewer.locator("#finding-detail")).to_contain_text(f"{ratio:.1f} times the threshold")
    word = "brighter" if report["findings"][0]["mean_difference"] > 0 else "darker"
    expect(viewer.locator("#finding-detail")).to_contain_text(f"{word} than the counterpart")
    expect(viewer.locator("#certainty")).to_contain_text(f"{report['scores']['scan']:.2f}")


def test_warnings_are_above_the_picture(page: Page, url: str, finished: str, report: dict[str, Any]) -> None:
    changed = report | {"warnings": ["The brain is doubtful."]}
    changed["input"] = report["input"] | {"notes": ["3 slices were left out."]}
    page.route("**/report.json", lambda route: route.fulfill(json=changed))
    page.goto(f"{url}/scans/{finished}")
    expect(page.locator("#warnings .warning")).to_have_text("⚠ Warning: The brain is doubtful.")
    expect(page.locator("#warnings .note")).to_have_text("Note: 3 slices were left out.")
    warning, stage = page.locator("#warnings").bounding_box(), page.locator("#stage").bounding_box()
    assert warning is not None
    assert stage is not None
    assert warning["y"] + warning["height"] <= stage["y"]


def test_a_site_profile_gives_the_range_of_the_score(
    page: Page, url: str, finished: str, report: dict[str, Any]
) -> None:
    score = {"low": 0.0, "high": report["scores"]["scan"] / 1.5}
    profile = {"id": "2026-11-28-abc", "scans": 20, "target_ml": 1.0, "scan_score": score, "other_scanner": True}
    changed = report | {"model": report["model"] | {"site_profile": profile}}
    page.route("**/report.json", lambda route: route.fulfill(json=changed))
    page.goto(f"{url}/scans/{finished}")
    expect(page.locator("#certainty")).to_contain_text("Above the healthy range")
    expect(page.locator("#certainty")).to_contain_text("site profile")
    expect(page.locator("#about")).to_contain_text("2026-11-28-abc: 20 healthy scans, at most 1 ml of false findings")
    expect(page.locator("#about")).to_contain_text("made for another scanner")


def test_a_deep_link_opens_a_finding_and_a_preview_comes_first(page: Page, url: str, finished: str) -> None:
    page.goto(f"{url}/scans/{finished}#finding=1")
    page.wait_for_selector("#first-picture[src^=blob]", state="attached")
    page.wait_for_selector("body[data-ready]")
    expect(page.locator("#findings tr[aria-selected=true]")).to_have_attribute("data-label", "1")
    expect(page.locator("#position")).to_contain_text("finding 1")


def test_an_uncertainty_map_is_offered_if_there_is_one(
    page: Page, url: str, service: RunningService, finished: str
) -> None:
    job = service.http.get(f"/v1/scans/{finished}").json()
    job["links"]["uncertainty"] = job["links"]["anomaly"]
    page.route(f"**/v1/scans/{finished}", lambda route: route.fulfill(json=job))
    open_viewer(page, f"{url}/scans/{finished}")
    before = wait_until_still(page.locator(SCAN))
    page.locator("input[name=map][value=uncertainty]").check()
    after = wait_for_change(page.locator(SCAN), before)
    # Its colours are others than those of the anomaly map: green instead of red.
    changed = np.abs(after - before).max(axis=2) > 8
    assert (after - before)[changed][:, 1].mean() > (after - before)[changed][:, 0].mean()


def test_without_webgl_the_preview_stays(page: Page, url: str, finished: str) -> None:
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null;")
    page.goto(f"{url}/scans/{finished}")
    expect(page.locator("#progress")).to_contain_text("no WebGL 2")
    page.wait_for_selector("#first-picture[src^=blob]")
    expect(page.locator("#findings tr")).to_have_count(1)


def test_a_failed_scan_shows_its_problem(page: Page, url: str, service: RunningService, finished: str) -> None:
    job = service.http.get(f"/v1/scans/{finished}").json()
    problem = {
        "title": "A slice is missing",
        "found": "gap",
        "expected": "no gap",
        "advice": "send all",
        "code": "irregular_slices",
    }
    page.route(
        f"**/v1/scans/{finished}", lambda route: route.fulfill(json=job | {"state": "failed", "problem": problem})
    )
    page.goto(f"{url}/scans/{finished}")
    expect(page.locator(".problem")).to_contain_text("irregular_slices")


def test_planes_are_reached_by_keys(viewer: Page) -> None:
    pictures = []
    for key in "123":
        before = pixels(viewer.locator(SCAN))
        viewer.keyboard.press(key)
        pictures.append(
            wait_until_still(viewer.locator(SCAN)) if key == "2" else wait_for_change(viewer.locator(SCAN), before)
        )
    assert all(differs(one, other) for one, other in pairwise(pictures))
    viewer.locator("#title").click()  # a focused slider takes the arrow keys itself
    index = viewer.locator("#coronal").input_value()
    viewer.keyboard.press("ArrowUp")
    assert int(viewer.locator("#coronal").input_value()) == int(index) + 1
    assert re.match(r"slice \d+ of \d+", str(viewer.locator("#coronal").get_attribute("aria-valuetext")))


def test_3d_shows_the_findings_and_not_the_map(viewer: Page) -> None:
    scan = viewer.locator(SCAN)
    before = pixels(scan)
    viewer.keyboard.press("5")
    with_findings = wait_for_change(scan, before)
    viewer.locator("#map-opacity").fill("1")
    assert not differs(wait_until_still(scan), with_findings)
    viewer.locator("input[name=mask][value=off]").check()
    wait_for_change(scan, with_findings)
