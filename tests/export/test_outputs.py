"""Contract of every output: written or explained for each kind of scan, served by the API, documented."""

import re
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.export.outputs import ALL_FORMATS, BRAIN_NAME, DICOM_NAMES, OPTIONAL_NAMES, OUTPUTS, REQUIRED_NAMES, media_type
from app.export.report import Report
from app.ingest.reader import RESULT_DICOM_NAMES
from app.main import create_app
from app.runtime.bundle import Bundle, load_bundle
from app.settings import Settings
from app.volume import Volume
from tests.support.dicom import write_series
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, grid, head, with_lesion
from tests.support.results import run_analysis, save_nifti, with_extractor

API_PAGE = Path(__file__).parents[2] / "docs" / "api.md"
HEAD_SHAPE = (76, 88, 80)
MEDIA_TYPES = {
    ".gz": "application/gzip",
    ".json": "application/json",
    ".png": "image/png",
    ".dcm": "application/dicom",
}
# Codes of the absent outputs by kind of scan.
ABSENT = {
    "nifti": {BRAIN_NAME: "no_brain_mask", **dict.fromkeys(DICOM_NAMES, "not_from_dicom")},
    "mgh": {BRAIN_NAME: "no_brain_mask", **dict.fromkeys(DICOM_NAMES, "not_from_dicom")},
    "head with skull": dict.fromkeys(DICOM_NAMES, "not_from_dicom"),
    "dicom": {BRAIN_NAME: "no_brain_mask"},
    "dicom without lesion": {BRAIN_NAME: "no_brain_mask", "segmentation.dcm": "no_lesion"},
}


@dataclass(frozen=True)
class Case:
    kind: str
    folder: Path
    report: Report


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(scope="module", params=ABSENT)
def case(
    request: pytest.FixtureRequest,
    bundle: Bundle,
    small_cubes: None,  # noqa: ARG001 - a module fixture cannot be requested by a mark
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    folder, kind = tmp_path_factory.mktemp("case"), str(request.param)
    if kind == "head with skull":
        volume = with_lesion(head(HEAD_SHAPE, grid(HEAD_SHAPE)), LESION_MM, RADIUS_MM)
        report = run_analysis(save_nifti(folder / "scan.nii.gz", volume), folder / "out", with_extractor(bundle))
    else:
        volume = brain() if kind == "dicom without lesion" else with_lesion(brain(), LESION_MM, RADIUS_MM)
        report = run_analysis(write_scan(folder, kind, volume), folder / "out", bundle)
    return Case(kind, folder / "out", report)


def write_scan(folder: Path, kind: str, volume: Volume) -> Path:
    if kind.startswith("dicom"):
        write_series(folder / "series", volume)
        return folder / "series"
    if kind == "mgh":
        nib.MGHImage(volume.array.astype(np.float32), volume.affine).to_filename(folder / "scan.mgz")
        return folder / "scan.mgz"
    return save_nifti(folder / "scan.nii.gz", volume)


def test_each_output_is_written_or_explained(case: Case) -> None:
    names = {path.name for path in case.folder.iterdir()}
    codes = {name: problem["code"] for name, problem in case.report.absent.items()}
    assert names.isdisjoint(codes)
    assert names | codes.keys() == {output.name for output in OUTPUTS}
    assert codes == ABSENT[case.kind]
    assert Report.model_validate_json((case.folder / "report.json").read_text()) == case.report


def test_output_exists_as_registered(case: Case) -> None:
    for output in OUTPUTS:
        exists = (case.folder / output.name).is_file()
        assert exists or not output.always, output.name
        assert not exists or case.report.input.format in output.formats, output.name


def test_names_and_media_types_are_registered_once() -> None:
    names = [output.name for output in OUTPUTS]
    assert len(set(names)) == len(names)
    assert {*REQUIRED_NAMES, *OPTIONAL_NAMES} == set(names)
    for output in OUTPUTS:
        assert media_type(output.name) == MEDIA_TYPES[Path(output.name).suffix]
        assert output.description.endswith(".")
        assert output.formats in (ALL_FORMATS, ("dicom",)), "`write_outputs` has a reason only for DICOM results"
        assert not output.always or output.formats == ALL_FORMATS


def test_every_format_is_a_case() -> None:
    assert {*ALL_FORMATS} <= ABSENT.keys()


def test_report_is_written_last() -> None:
    """The report lists the absent outputs."""
    assert max(OUTPUTS, key=lambda output: output.order).name == "report.json"


def test_counterpart_is_written_alone() -> None:
    """The array is as large as the scan."""
    orders = {output.name: output.order for output in OUTPUTS}
    assert list(orders.values()).count(orders["counterpart.nii.gz"]) == 1


def test_api_serves_every_output(tmp_path: Path) -> None:
    paths = create_app(Settings(store=str(tmp_path))).openapi()["paths"]
    results = (re.fullmatch(r"/v1/scans/\{[a-z_]+\}/([a-z.]+\.[a-z]+)", path) for path in paths)
    names = {result[1] for result in results if result}
    assert names == {output.name for output in OUTPUTS}


@pytest.mark.skipif(not API_PAGE.is_file(), reason="docs/api.md does not exist")
def test_api_page_lists_every_output() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", API_PAGE.read_text(), re.MULTILINE)
    assert [output.name for output in OUTPUTS if output.name not in listed] == []


def test_reader_knows_the_names_of_dicom_results() -> None:
    """A folder with results is read again without them."""
    assert set(RESULT_DICOM_NAMES) == set(DICOM_NAMES)
