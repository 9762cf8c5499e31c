"""What a bundle must refuse comes as a hospital's scan would: in the model's units, and in stacks."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from training import foreign
from training.config import ROOT, Config
from training.pictures import BLOCK

pytestmark = pytest.mark.training

PICTURES = BLOCK + 3


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, the second first; a picture of a hand is as bright as its number says."""
    folder = tmp_path / "mednist"
    folder.mkdir()
    with tarfile.open(folder / f"{foreign.OTHER_CLASSES}.tar.xz", "w:xz") as tar:
        for label, count in (("Hand", PICTURES), ("CXR", 2)):
            for number in range(count):
                stream = io.BytesIO()
                Image.fromarray(np.full((64, 64), 25 + number, np.uint8)).save(stream, "JPEG", quality=100)
                member = tarfile.TarInfo(f"{label}/{900 - number:06d}.jpeg")
                member.size = stream.tell()
                tar.addfile(member, io.BytesIO(stream.getvalue()))
    monkeypatch.setenv("COUNTERPART_DATA", str(tmp_path))
    return tmp_path


def test_classes_are_in_order_and_pictures_as_they_lie(archive: Path) -> None:
    assert archive.exists()
    found = foreign.mednist(foreign.OTHER_CLASSES)
    assert list(found) == ["CXR", "Hand"]
    assert list(found["Hand"])[:2] == ["Hand/000900.jpeg", "Hand/000899.jpeg"]


def test_stacks_are_in_the_units_of_the_model(archive: Path) -> None:
    assert archive.exists()
    config = Config.load(ROOT / "training" / "configs" / "headct.toml")
    stacks = list(foreign.mednist_stacks(config))
    assert [(s.kind, s.name, s.volume.shape[2]) for s in stacks] == [
        ("CXR", "CXR 0", 2),
        ("Hand", "Hand 0", BLOCK),
        ("Hand", f"Hand {BLOCK}", PICTURES - BLOCK),
    ]
    # Black is 0 HU, and a grey value 80/230 of a unit.
    np.testing.assert_allclose(stacks[1].volume.array[5, 7, :4], [0, 80 / 230, 160 / 230, 240 / 230], atol=0.2)


def test_a_stack_to_be_refused_is_as_wide_as_a_head(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its size alone would tell what it is not."""
    assert archive.exists()
    for source in ("volumes", "lgg", "mednist_pictures"):
        monkeypatch.setattr(foreign, source, lambda: iter(()))
    config = Config.load(ROOT / "training" / "configs" / "headct.toml")
    found = list(foreign.all_foreign(config))
    assert [f.kind.split(",")[0] for f in found] == ["MedNIST CXR", "MedNIST Hand", "MedNIST Hand"]
    np.testing.assert_allclose(found[0].volume.spacing, [200 / 64, 200 / 64, config.preprocessing.spacing_mm[0]])
    flair = Config.load(ROOT / "training" / "configs" / "flair.toml")
    assert list(foreign.all_foreign(flair)) == []
