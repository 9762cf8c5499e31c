"""The worklist: send, follow, filter, cancel, delete, with the mouse and with the keyboard."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from app.sample import make_sample
from tests.api.service_process import RunningService
from tests.support.phantom import brain
from tests.support.results import save_nifti
from tests.web.conftest import MODEL, run_scan


def row_of(page: Page, name: str) -> Locator:
    return page.locator("#scans tr", has=page.get_by_role("link", name=name, exact=True))


def send(page: Page, url: str, path: Path) -> Locator:
    page.goto(url)
    page.locator("#send-model").select_option(MODEL)
    page.set_input_files("#files", path)
    return row_of(page, path.name)


@pytest.mark.parametrize("kind", ["phantom", "dicom_zip"])
def test_a_chosen_file_is_sent_and_followed_to_its_findings(
    page: Page, url: str, kind: str, request: pytest.FixtureRequest
) -> None:
    row = send(page, url, request.getfixturevalue(kind))
    expect(row).to_contain_text("finished")
    expect(row).to_contain_text("1 finding")
    expect(row).to_contain_text(MODEL)
    expect(row.locator("img")).to_have_js_property("complete", value=True)
    assert row.locator("img").evaluate("image => image.naturalWidth") > 0


def test_a_dropped_dicom_folder_is_read_to_its_last_level(page: Page, url: str) -> None:
    # A page cannot make a drop with folders: entries of the File System API are replaced.
    page.goto(url)
    sent = page.evaluate("""async () => {
        const { collectFiles } = await import("./web/js/upload.js");
        const file = (name) => ({ isFile: true, isDirectory: false, file: (done) => done(new File(["x"], name)) });
        const folder = (children) => ({
          isFile: false, isDirectory: true,
          createReader: () => ({ readEntries: (done) => done(children.splice(0, 100)) }),
        });
        const slices = Array.from({ length: 230 }, (_, index) => file(`IM${index}`));
        const root = folder([file("one"), folder(slices)]);
        const files = await collectFiles([{ kind: "file", webkitGetAsEntry: () => root }, { kind: "string" }]);
        return files.map(({ name }) => name);
    }""")
    assert len(sent) == 231
    assert set(sent) == {"one", *(f"IM{index}" for index in range(230))}


def test_names_of_files_are_not_sent(page: Page, url: str) -> None:
    page.goto(url)
    names = page.evaluate("""async () => {
        const { toBody } = await import("./web/js/upload.js");
        const form = toBody([new File(["a"], "Zweistein.dcm"), new File(["b"], "Zweistein2.dcm")]);
        return [...form.getAll("file")].map(({ name }) => name);
    }""")
    assert names == ["0", "1"]


def test_a_file_that_is_no_image_becomes_a_card_with_advice(page: Page, url: str, tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear colleague, " * 50)
    page.goto(url)
    page.set_input_files("#files", path)
    card = page.locator("#uploads .problem")
    for part in ("Found", "Expected", "What to do", "not_an_image_format"):
        expect(card).to_contain_text(part)
    page.get_by_role("button", name="Dismiss").click()
    expect(card).to_have_count(0)


def test_a_scan_that_the_model_cannot_read_becomes_a_row_with_the_reason(page: Page, url: str, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "small.nii.gz", brain(scale=0.4))
    row = send(page, url, path)
    expect(row).to_contain_text("failed")
    row.locator("summary").click()
    expect(row.locator("dl")).to_contain_text("Expected")
    expect(row.locator("code")).not_to_be_empty()


def test_delete_asks_first(page: Page, url: str, service: RunningService, tmp_path: Path) -> None:
    job = run_scan(service.http, save_nifti(tmp_path / "scan.nii.gz", brain()))
    page.goto(url)
    row = page.locator(f'tr[data-id="{job}"]')
    row.focus()
    page.keyboard.press("Delete")
    page.get_by_role("button", name="Keep").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog")).to_contain_text("cannot be undone")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    assert service.http.get(f"/v1/scans/{job}").status_code == 404


def test_a_scan_can_be_cancelled(page: Page, url: str, service: RunningService, tmp_path: Path) -> None:
    # The shipped bundle needs half a minute for a scan: time enough to cancel it. A seed of its own: a new job.
    scan = make_sample(tmp_path, seed=1).scan
    (shipped,) = [m["id"] for m in service.http.get("/v1/models").json()["models"] if m["name"] == "t1"]
    page.goto(url)
    page.locator("#send-model").select_option(shipped)
    page.set_input_files("#files", scan)
    row = row_of(page, scan.name)
    expect(row.locator("progress")).to_be_visible()
    row.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the analysis").click()
    expect(row).to_contain_text("cancelled")
    job = str(row.get_attribute("data-id"))
    assert service.http.get(f"/v1/scans/{job}").json()["state"] == "cancelled"


def test_the_list_is_used_with_the_keyboard_alone(page: Page, url: str, finished: str) -> None:
    page.goto(url)
    page.locator(f'tr[data-id="{finished}"]').wait_for()
    page.keyboard.press("/")
    page.keyboard.type(finished[:12])
    expect(page.locator("#scans tr")).to_have_count(1)
    page.locator("body").click(position={"x": 5, "y": 700})
    page.keyboard.press("j")
    expect(page.locator(f'tr[data-id="{finished}"]')).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/scans/{finished}")


def test_filters_and_order(page: Page, url: str, finished: str, service: RunningService) -> None:
    page.goto(url)
    page.locator(f'tr[data-id="{finished}"]').wait_for()
    page.locator("#filter-state").select_option("failed")
    expect(page.locator(f'tr[data-id="{finished}"]')).to_have_count(0)
    page.locator("#filter-state").select_option("succeeded")
    expect(page.locator(f'tr[data-id="{finished}"]')).to_be_visible()
    page.get_by_role("button", name="Findings").click()
    expect(page.locator("th[data-sort=volume]")).to_have_attribute("aria-sort", "descending")
    shown = page.locator("#scans tr").evaluate_all("rows => rows.map((row) => row.dataset.id)")
    scans = service.http.get("/v1/scans?state=succeeded").json()["scans"]
    volumes = {scan["id"]: scan["lesion_volume_ml"] for scan in scans}
    assert [volumes[job] for job in shown] == sorted(volumes.values(), reverse=True)


def test_a_service_that_stops_answering_is_reported_and_found_again(page: Page, url: str, finished: str) -> None:
    page.goto(url)
    page.locator(f'tr[data-id="{finished}"]').wait_for()
    page.route("**/v1/scans?*", lambda route: route.abort())
    expect(page.locator("#connection")).to_contain_text("does not answer")
    page.unroute("**/v1/scans?*")
    expect(page.locator("#connection")).to_be_hidden()


def test_a_problem_never_becomes_markup(page: Page, url: str) -> None:
    attack = "<img src=x onerror=alert(1)>"
    problem = {"code": "x", "title": attack, "found": attack, "expected": attack, "advice": attack, "status": 400}
    page.route(
        "**/v1/scans?*",
        lambda route: route.fulfill(status=400, content_type="application/json", body=json.dumps(problem)),
    )
    page.goto(url)
    expect(page.locator("#connection")).to_contain_text(attack)
    assert page.locator("#connection img").count() == 0
