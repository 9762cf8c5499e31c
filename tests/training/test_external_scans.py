"""Tests of scans from outside the training data: units of the model, stacks, and field of view."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import external_scans
from training.config import ROOT, Config
from training.image_archive import SUBJECT_FILES

CONFIGS = ROOT / "training" / "configs"
IMAGES = SUBJECT_FILES + 3


@pytest.fixture(autouse=True)
def _archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an archive of two classes in reverse order. The grey value of an image is its position plus 25."""
    folder = tmp_path / "mednist"
    folder.mkdir()
    with tarfile.open(folder / f"{external_scans.OTHER_CLASSES}.tar.xz", "w:xz") as tar:
        for label, count in (("Hand", IMAGES), ("CXR", 2)):
            for number in range(count):
                stream = io.BytesIO()
                Image.fromarray(np.full((64, 64), 25 + number, np.uint8)).save(stream, "JPEG", quality=100)
                member = tarfile.TarInfo(f"{label}/{900 - number:06d}.jpeg")
                member.size = stream.tell()
                tar.addfile(member, io.BytesIO(stream.getvalue()))
    monkeypatch.setenv("COUNTERPART_DATA", str(tmp_path))


def test_classes_are_sorted_and_images_keep_the_order_of_the_archive() -> None:
    found = external_scans.read_mednist_classes(external_scans.OTHER_CLASSES)
    assert list(found) == ["CXR", "Hand"]
    assert list(found["Hand"])[:2] == ["Hand/000900.jpeg", "Hand/000899.jpeg"]


def test_stacks_are_in_the_units_of_the_model() -> None:
    stacks = list(external_scans.mednist_stacks(Config.load(CONFIGS / "headct.toml")))
    assert [(s.kind, s.name, s.volume.shape[2]) for s in stacks] == [
        ("CXR", "CXR 0", 2),
        ("Hand", "Hand 0", SUBJECT_FILES),
        ("Hand", f"Hand {SUBJECT_FILES}", IMAGES - SUBJECT_FILES),
    ]
    # The grey value 25 is 0 HU, and a step of one grey value is 80/230 HU.
    np.testing.assert_allclose(stacks[1].volume.array[5, 7, :4], [0, 80 / 230, 160 / 230, 240 / 230], atol=0.2)


def test_foreign_stack_has_the_field_of_view_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("other_volumes", "lgg_slices", "mednist_slices"):
        monkeypatch.setattr(external_scans, source, lambda: iter(()))
    config = Config.load(CONFIGS / "headct.toml")
    found = list(external_scans.foreign_scans(config))
    assert [f.kind.split(",")[0] for f in found] == ["MedNIST CXR", "MedNIST Hand", "MedNIST Hand"]
    np.testing.assert_allclose(found[0].volume.spacing, [200 / 64, 200 / 64, config.preprocessing.spacing_mm[0]])
    assert list(external_scans.foreign_scans(Config.load(CONFIGS / "flair.toml"))) == []
