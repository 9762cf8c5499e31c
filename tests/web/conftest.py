"""One service with the tiny and the shipped T1 bundle, and one browser, for all tests of the pages."""

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from benchmarks.run import newest_bundle
from tests.api.service_process import RunningService, run_service
from tests.support.dicom import write_series, zip_files
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, with_lesion
from tests.support.results import save_nifti
from tests.web.browser import CHROMIUM, TIMEOUT, Recorder, chromium

COMMAND = (sys.executable, "-m", "app.cli", "serve")
MODEL = "tiny-0.0.1"


expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="session")
def installed_browser() -> Path:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} does not exist (apt-get install chromium)")
    return CHROMIUM


@pytest.fixture(scope="module")
def browser(installed_browser: Path) -> Iterator[Browser]:
    # Playwright keeps an event loop running in this thread, so it must end before the tests of another module.
    assert installed_browser.exists()
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny bundle, which is fast, and the newest T1 bundle, which knows the sample."""
    folder = tmp_path_factory.mktemp("web-models")
    shipped = newest_bundle("t1")
    for bundle in (tiny_models / MODEL, shipped):
        (folder / bundle.name).symlink_to(bundle)
    return folder


@pytest.fixture(scope="session")
def service(
    installed_browser: Path, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    assert installed_browser.exists()  # nothing starts without a browser
    folder = tmp_path_factory.mktemp("web-service")
    with run_service(folder / "store", folder / "log", COMMAND, models=str(models)) as running:
        yield running


@pytest.fixture(scope="session")
def url(service: RunningService) -> str:
    return f"http://127.0.0.1:{service.port}"


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a NIfTI file: a brain with one lesion."""
    folder = tmp_path_factory.mktemp("web-phantom")
    return save_nifti(folder / "scan.nii.gz", with_lesion(brain(), LESION_MM, RADIUS_MM))


@pytest.fixture(scope="session")
def dicom_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a zip of a DICOM series of the same brain."""
    folder = tmp_path_factory.mktemp("web-dicom")
    return zip_files(folder / "series.zip", write_series(folder / "series", with_lesion(brain(), LESION_MM, RADIUS_MM)))


@pytest.fixture(scope="session")
def finished(service: RunningService, phantom: Path) -> str:
    """Return the id of a finished job of the phantom."""
    return run_scan(service.http, phantom)


@pytest.fixture
def disputed(service: RunningService, finished: str) -> Iterator[str]:
    """Return the id of the finished job, about whose finding two readers disagree. The newest verdict is of A."""
    reviews = f"/v1/scans/{finished}/reviews"

    def remove_all() -> None:
        for review in service.http.get(reviews).json()["reviews"]:
            service.http.delete(f"{reviews}/1", params={"reader": review["reader"]})

    remove_all()
    verdicts = (("A", "right", ""), ("B", "wrong", "<b>Motion</b>"), ("A", "unsure", "Beside the ventricle."))
    for reader, verdict, note in verdicts:
        review = {"reader": reader, "verdict": verdict, "note": note}
        assert service.http.put(f"{reviews}/1", json=review).status_code == 200
    yield finished
    remove_all()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def context(browser: Browser, recorder: Recorder) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(TIMEOUT)
    recorder.watch(context)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, recorder: Recorder, url: str) -> Iterator[Page]:
    """Return a page. Afterwards, check that nothing left the origin, no script failed and no policy was violated."""
    page = context.new_page()
    yield page
    assert recorder.foreign(url) == []
    assert recorder.faults == []


def run_scan(http: httpx2.Client, path: Path, query: str = f"?model={MODEL}") -> str:
    """Send a scan, wait for its result, and return the id of the job."""
    response = http.post(f"/v1/scans{query}", content=path.read_bytes(), headers={"Prefer": "wait=120"})
    assert response.status_code == 200, response.text
    job: str = response.json()["id"]
    return job
