"""The examples of docs/other-viewers.md and docs/client.md, run as they are written against a served process."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel as nib
import pydicom
import pytest

from tests.api.service_process import run_service
from tests.support.dicom import write_series, zip_files
from tests.support.external_tools import run_or_skip
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, with_lesion
from tests.support.results import save_nifti

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = (CHECKOUT / "docs" / "other-viewers.md").read_text()
CLIENT_PAGE = (CHECKOUT / "docs" / "client.md").read_text()
NIIVUE = CHECKOUT / "app" / "web" / "vendor" / "niivue.js"
CHROMIUM = shutil.which("chromium")
COMMAND = (sys.executable, "-m", "app.cli", "serve")
WRITTEN_URL = "http://127.0.0.1:8000"
SECONDS = 180
# WebGL without a GPU.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
HTML = """<!doctype html><script type="importmap">{"imports": {"@niivue/niivue": "./niivue.js"}}</script>
<canvas id="scan" width="600" height="400"></canvas><script type="module" src="example.js"></script>"""


def find_example(name: str) -> str:
    """Return the code block of the page behind a mark."""
    found = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, name
    return found[1]


class Pages(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Return the folder and the origin of another web server."""
    folder = tmp_path_factory.mktemp("site")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Pages, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def url(site: tuple[Path, str], tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    environ = {"COUNTERPART_CORS_ORIGINS": site[1]}
    with run_service(
        folder / "store", folder / "log", COMMAND, environ, models=str(tiny_models), threads="1", drain_seconds="0"
    ) as service:
        yield f"http://127.0.0.1:{service.port}"


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the same head as NIfTI and as a zip of a DICOM series."""
    folder = tmp_path_factory.mktemp("scans")
    volume = with_lesion(brain(), LESION_MM, RADIUS_MM)
    series = zip_files(folder / "series.zip", write_series(folder / "series", volume))
    return {"nifti": save_nifti(folder / "scan.nii.gz", volume), "dicom": series}


def run(folder: Path, url: str, *command: str) -> str:
    """Run an example in a folder, and return its output."""
    command = tuple(part.replace(WRITTEN_URL, url) for part in command)
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_shell(folder: Path, url: str, scan: Path) -> dict[str, Any]:
    """Run the example for curl with a scan, and return the job."""
    shutil.copy(scan, folder / "scan.nii.gz")
    run(folder, url, "sh", "-euc", find_example("shell"))
    job: dict[str, Any] = json.loads((folder / "job.json").read_text())
    return job


def test_shell(url: str, scans: dict[str, Path], tmp_path: Path) -> None:
    job = run_shell(tmp_path, url, scans["nifti"])
    assert job["state"] == "succeeded"
    listed = {shown["id"]: shown for shown in json.loads((tmp_path / "list.json").read_text())["scans"]}
    report = json.loads((tmp_path / "report.json").read_text())
    assert listed[job["id"]]["findings_count"] == len(report["findings"]) > 0
    assert listed[job["id"]]["lesion_volume_ml"] == report["lesion_volume_ml"]
    assert (tmp_path / "thumbnail.png").read_bytes().startswith(b"\x89PNG")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert isinstance(mask, nib.Nifti1Image)
    assert mask.get_fdata().sum() > 0


@pytest.mark.parametrize(
    "example", [find_example("python"), re.findall(r"```python\n(.*?)```", CLIENT_PAGE, re.DOTALL)[0]]
)
def test_python(url: str, scans: dict[str, Path], tmp_path: Path, example: str) -> None:
    shutil.copy(scans["nifti"], tmp_path / "scan.nii.gz")
    printed = run(tmp_path, url, sys.executable, "-c", example.replace('"t1"', '"tiny"'))
    label, volume_ml = printed.split()[:2]
    assert label == "1"
    assert float(volume_ml) == pytest.approx(4 / 3 * 3.1416 * RADIUS_MM**3 / 1000, rel=0.5)


@pytest.mark.skipif(CHROMIUM is None or not NIIVUE.is_file(), reason="needs Chromium and app/web/vendor/niivue.js")
def test_browser(url: str, site: tuple[Path, str], scans: dict[str, Path], tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    job = run_shell(tmp_path, url, scans["nifti"])
    folder, origin = site
    shutil.copy(NIIVUE, folder / "niivue.js")
    (folder / "index.html").write_text(HTML)
    script = find_example("browser").replace(WRITTEN_URL, url)
    (folder / "example.js").write_text(f"{script}\nwindow.viewer = viewer;\n")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page()
            page.goto(f"{origin}/?job={job['id']}")
            page.wait_for_function("window.viewer", timeout=SECONDS * 1000)
            warning = "The model may not fit the scan"
            assert page.title().startswith(f"Findings: {len(job['findings'])}. {warning}")
            position = page.evaluate("Array.from(viewer.frac2mm(viewer.scene.crosshairPos)).slice(0, 3)")
            drawn = page.locator("#scan").screenshot()
        finally:
            browser.close()
    surest = max(job["findings"], key=lambda finding: finding["peak_score"])
    assert position == pytest.approx(surest["centroid_mm"], abs=3)
    assert count_red(drawn) > 50


def count_red(png: bytes) -> int:
    """Return the number of pixels of a picture that are more red than grey."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((pixels[..., 0] > pixels[..., 1:].max(axis=-1) + 40).sum())


def test_orthanc(url: str, scans: dict[str, Path], tmp_path: Path) -> None:
    """Orthanc listens on every address, so it runs in a network namespace, and the service outside of it."""
    if not shutil.which("Orthanc", path=os.environ["PATH"] + ":/usr/sbin"):
        pytest.skip("no Orthanc: apt-get install orthanc orthanc-dicomweb")
    job = run_shell(tmp_path, url, scans["dicom"])
    fetch, store = find_example("orthanc").splitlines()
    run(tmp_path, url, "sh", "-euc", f"id={job['id']}\n{fetch}")
    options = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *options, "--net", sys.executable, "-m", __name__, store]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = run_or_skip(command, cwd=tmp_path, env=env)
    assert json.loads(done.stdout)["series"] == [["SEG", 1]]
    assert json.loads((tmp_path / "stored.json").read_text())["Status"] == "Success"
    source = pydicom.dcmread(next((scans["dicom"].parent / "series").iterdir()))
    assert pydicom.dcmread(tmp_path / "segmentation.dcm").StudyInstanceUID == source.StudyInstanceUID


def run_with_orthanc(command: str) -> None:
    """Run a command of a shell beside a new Orthanc, and print what Orthanc has stored."""
    from tests.proofs import orthanc_round_trip as orthanc

    orthanc.raise_loopback()
    with tempfile.TemporaryDirectory() as folder, orthanc.orthanc(Path(folder)):
        subprocess.run(["/bin/sh", "-euc", command], check=True)
        sys.stdout.write(json.dumps(orthanc.indexed()))


if __name__ == "__main__":
    run_with_orthanc(sys.argv[1])
