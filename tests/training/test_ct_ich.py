"""Head CT of ct-ich: the order of its stacks, healthy slices, Hounsfield units, outlines and statistics."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import config as configuration
from training.config import ROOT, Config
from training.evaluate_haemorrhage import area_under_curve, patient_interval, read_outlines, summarise
from training.haemorrhage_page import haemorrhage_table
from training.image_archive import first_of_stack, load_stack, open_archive, stack_names, to_model_units

SLICES = 12
HEADER = "file\tpatient\tslice\tintraventricular\tintraparenchymal\tsubarachnoid\tepidural\tsubdural"


def head_image(z: float) -> np.ndarray:
    """Return an image whose disc grows and shrinks slowly with its height z, 0 to 1."""
    rows, columns = np.mgrid[-32:32, -32:32]
    return np.where(np.hypot(rows, columns) < 8 + 20 * np.sin(np.pi * (0.1 + 0.55 * z)), 110, 0).astype(np.uint8)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Write a patient whose stack begins in the middle, and one with a haemorrhage in slice 6 and a fracture in 2."""
    folder = tmp_path / "ct_ich"
    (folder / "slices").mkdir(parents=True)
    lines = [HEADER + "\tno_hemorrhage\tfracture_yes_no\tslice_labels"]
    for patient, first in (("61", 5), ("78", 0)):
        for number in range(1, SLICES + 1):
            name = f"{int(patient):03d}_{number:02d}.jpg"
            height = ((number - 1 + first) % SLICES) / (SLICES - 1)
            Image.fromarray(head_image(height)).save(folder / "slices" / name, quality=95)
            bleeds = patient == "78" and number == 6
            fractured = int(patient == "78" and number == 2)
            lines.append(f"{name}\t{patient}\t{number}\t0\t{int(bleeds)}\t0\t0\t0\t{int(not bleeds)}\t{fractured}\tok")
    (folder / "slices.tsv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(configuration, "data_root", lambda: tmp_path)
    monkeypatch.setattr("training.image_archive.data_root", lambda: tmp_path)
    return Config.load(ROOT / "training" / "configs" / "ct.toml")


def test_stack_begins_at_the_jaw(config: Config) -> None:
    assert stack_names(config, "061")[0] == "061_08.jpg"
    assert stack_names(config, "078")[0] == "078_01.jpg"
    ordered = load_stack(config, "061").volume.array > 0
    np.testing.assert_array_equal(ordered, load_stack(config, "078").volume.array > 0)


def test_first_of_an_ordered_stack_is_its_first_image() -> None:
    images = np.stack([head_image(z) for z in np.linspace(0, 1, SLICES)])
    for shift in range(SLICES):
        assert first_of_stack(np.roll(images, shift, axis=0)) == shift


def test_slices_beside_a_haemorrhage_and_fractured_ones_are_not_healthy(config: Config) -> None:
    archive = open_archive(config)
    healthy = dict(zip(archive.names, archive.healthy.tolist(), strict=True))
    unhealthy = [name for name, is_healthy in healthy.items() if not is_healthy]
    assert unhealthy == ["078_02.jpg", "078_05.jpg", "078_06.jpg", "078_07.jpg"]


def test_grey_values_become_hounsfield_units(config: Config) -> None:
    grey = np.array([[0, 2, 3, 102, 250, 251, 255]], dtype=np.uint8)
    units = to_model_units(grey, config)
    assert units.ravel().tolist() == pytest.approx([-1000, -1000, 3 / 255 * 80, 32, 250 / 255 * 80, 1000, 1000])


def test_outlines_lie_on_the_grid_of_the_stack(tmp_path: Path) -> None:
    outline = np.zeros((8, 10), dtype=np.uint8)
    outline[2, 7] = 255
    Image.fromarray(outline).save(tmp_path / "078_02.png")
    found = read_outlines(tmp_path, ["078_01.jpg", "078_02.jpg"])
    assert found.shape == (10, 8, 2)
    assert np.argwhere(found).tolist() == [[7, 2, 1]]
    assert not read_outlines(tmp_path, ["099_01.jpg"]).any()


def test_area_under_the_curve() -> None:
    assert area_under_curve([1, 2, 3, 4], [False, False, True, True]) == 1
    assert area_under_curve([4, 3, 2, 1], [False, False, True, True]) == 0
    assert area_under_curve([0, 0, 0, 1], [False, False, True, True]) == 0.75  # ties count half


def patient(number: int, *, haemorrhage: bool, volume: float, adult: bool = True) -> dict[str, object]:
    kinds = ["subdural"] if haemorrhage else []
    slices = [
        {"bleeds": kinds, "found_ml": volume, "brighter_ml": volume / 2, "score": volume},
        {"bleeds": [], "found_ml": 0.0, "brighter_ml": 0.0, "score": 0.0},
    ]
    return {
        "subject": str(number),
        "adult": adult,
        "haemorrhage": haemorrhage,
        "outcome": "analysed",
        "found_ml": volume,
        "brighter_ml": volume / 2 if haemorrhage else 0.0,
        "score": volume,
        "slices": slices,
    }


def test_summary_counts_adults_and_resamples_patients() -> None:
    rows = [patient(i, haemorrhage=True, volume=float(v)) for i, v in enumerate((5, 6, 0))]
    rows += [patient(i + 10, haemorrhage=False, volume=float(v)) for i, v in enumerate((0, 1, 2))]
    rows.append(patient(20, haemorrhage=True, volume=0.0, adult=False))
    found = summarise(rows)
    assert (found["patients"], found["with_haemorrhage"]) == (6, 3)
    value, low, high = found["patient_auroc_volume"]
    assert value == pytest.approx((3 + 3 + 0.5) / 9)
    assert 0 <= low < value < high <= 1
    assert found["slices_found_by_kind"]["subdural"] == [2, 3]
    assert found["false_positive_ml"][0] == 1
    assert found["false_positive_brighter_ml"] == [0, 0]
    assert found["patient_auroc_brighter"][0] == pytest.approx((3 + 3 + 1.5) / 9), "the third patient is tied with all"
    assert found["slices_found_brighter_by_kind"]["subdural"] == [2, 3]


def test_page_has_a_column_for_findings_that_are_brighter() -> None:
    rows = [patient(i, haemorrhage=i < 2, volume=1.0 + i) for i in range(4)]
    text = "\n".join(haemorrhage_table([*rows, {"summary": summarise(rows)}]))
    assert "| found in adults without haemorrhage, ml: median, 90th percentile | 3.50, 3.90 | 0.00, 0.00 |" in text
    assert "| subdural | 2 of 2 | 2 of 2 |" in text
    assert "| 1 | yes | yes | analysed | 2.00 | 1 of 1 |  |  | 1.00 |  |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert [len({line.count("|") for line in each.splitlines()}) for each in tables] == [1, 1, 1]


def test_interval_of_a_constant_has_no_width() -> None:
    rows = [patient(i, haemorrhage=i < 2, volume=1.0) for i in range(4)]
    assert patient_interval(rows, lambda _: 0.5) == [0.5, 0.5, 0.5]
