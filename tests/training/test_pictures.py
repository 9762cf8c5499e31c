"""Archives of pictures become scans, and only what is healthy in them is learnt from."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from app.manifest import Preprocessing
from app.pipeline.preprocess import to_slices
from tests.support.phantom import brain, grid
from training import data, pictures
from training.calibrate import apart
from training.config import ROOT, Config
from training.data import cached_slices, data_hash, load_scan
from training.exclusions import excluded_pictures
from training.pictures import BLOCK, block_name, open_pictures, read_lgg, read_mednist
from training.splits import Split, load_split

CONFIGS = ROOT / "training" / "configs"
HEADS = brain((64, 64, 26), grid((64, 64, 26), (3.8, 3.8, 5.0))).array / 900  # (X, Y, Z) in [0, 1)


def picture(z: int, low: int, high: int) -> np.ndarray:
    """One axial slice as a picture: rows from the front to the back, columns from the right to the left."""
    return np.round(low + (high - low) * np.clip(HEADS[::-1, ::-1, z].T, 0, 1)).astype(np.uint8)


@pytest.fixture
def headct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two blocks of pictures; every second one of the first is empty."""
    folder = tmp_path / "mednist"
    folder.mkdir()
    with tarfile.open(folder / "heads.tar", "w") as archive:
        for number in range(2 * BLOCK):
            empty = number < BLOCK and number % 2
            image = Image.fromarray(picture(0 if empty else 6 + number % 14, 25, 255))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=95)
            member = tarfile.TarInfo(f"HeadCT/{number:06d}.jpeg")
            member.size = stream.tell()
            archive.addfile(member, io.BytesIO(stream.getvalue()))
    return of(tmp_path, monkeypatch, "headct", {"pattern": "heads.tar"})


@pytest.fixture
def flair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two patients of ten slices; the first has a tumour in its sixth."""
    folder = tmp_path / "lgg_flair"
    folder.mkdir()
    tumour = np.zeros(20, dtype=np.int32)
    tumour[5] = 99
    np.savez(
        folder / "slices.npz",
        images=np.stack([picture(6 + i % 10, 0, 200) for i in range(20)]),
        patient=np.repeat(["a", "b"], 10),
        slice_no=np.tile(np.arange(10, dtype=np.int16), 2),
        tumour_px_256=tumour,
    )
    changes: dict[str, object] = {"pattern": "slices.npz"}
    return of(tmp_path, monkeypatch, "flair", changes, pixel_mm=3.8, exclusions="")


def of(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, object], **pictured: object) -> Config:
    """The shipped configuration, on other data, with its cache elsewhere."""
    monkeypatch.setenv("COUNTERPART_DATA", str(root))
    monkeypatch.setattr("training.config.ROOT", root)
    config = Config.load(CONFIGS / f"{name}.toml")
    assert config.data.pictures is not None
    other = config.data.pictures.model_copy(update={"exclusions": "", **pictured})
    return config.model_copy(update={"data": config.data.model_copy(update={**change, "pictures": other})})


def test_a_picture_of_a_ct_has_hounsfield_units(headct: Config) -> None:
    scan = load_scan(headct, block_name(BLOCK))
    assert scan.volume.shape == (64, 64, BLOCK)
    # 25 is the lower end of the window and 255 its upper end; jpeg is off by a grey value or two.
    assert scan.volume.array.max() == pytest.approx(80 * HEADS.max(), abs=2)
    assert np.median(scan.volume.array[:8]) == 0
    assert scan.volume.spacing == pytest.approx([3.8, 3.8, 5.0])


def test_empty_and_excluded_pictures_cut_no_stack_in_two(headct: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = open_pictures(headct)
    assert everything.subjects.count(block_name(0)) == BLOCK
    assert load_scan(headct, block_name(0)).volume.shape == (64, 64, BLOCK // 2)
    excluded = read_mednist(pictures.archive_path(headct), frozenset({"000000.jpeg", "000002.jpeg"}))
    monkeypatch.setattr(pictures, "open_pictures", lambda _: excluded)
    assert load_scan(headct, block_name(0)).volume.shape == (64, 64, BLOCK // 2 - 2)


def test_every_picture_is_a_slice_of_the_size_of_all(headct: Config) -> None:
    scan = load_scan(headct, block_name(BLOCK))
    slices = to_slices(scan.volume, headct.training_preparation)
    assert len(slices.x) == BLOCK
    fit = headct.preprocessing.head_box
    assert fit is not None
    largest = slices.foreground[slices.foreground.sum(axis=(1, 2)).argmax()]
    rows, columns = largest.any(axis=1).sum(), largest.any(axis=0).sum()
    assert (rows, columns) == pytest.approx((fit.rows, fit.columns), abs=3)  # the box leaves the outermost lines out


def test_front_and_left_of_a_picture_stay_there(headct: Config) -> None:
    """The phantom's ventricles lie in front of its middle: a picture read upside down has them behind."""
    x = to_slices(load_scan(headct, block_name(BLOCK)).volume, headct.training_preparation).x
    phantom = to_slices(brain((64, 64, 26), grid((64, 64, 26), (3.8, 3.8, 5.0))), headct_free(headct)).x
    best = max(float(np.corrcoef(x[6, 0].ravel(), p[0].ravel())[0, 1]) for p in phantom)
    turned = max(float(np.corrcoef(x[6, 0, ::-1, ::-1].ravel(), p[0].ravel())[0, 1]) for p in phantom)
    assert best > 0.97
    assert best > turned


def headct_free(config: Config) -> Preprocessing:
    """The same preparation with intensities by a percentile, for the phantom's own units."""
    free = {"window": None, "intensity_percentile": 98.0, "intensity_level": 0.5}
    return config.preprocessing.model_copy(update=free)


def test_slices_beside_a_tumour_are_not_learnt_from(flair: Config) -> None:
    scan = load_scan(flair, "a")
    assert scan.healthy is not None
    assert np.flatnonzero(~scan.healthy).tolist() == [4, 5, 6]
    preparation = flair.training_preparation
    slices = to_slices(scan.volume, preparation)
    assert len(slices.x) == 10  # all of them say how large the head is
    assert scan.known(slices, preparation).tolist() == [0, 1, 2, 3, 7, 8, 9]


def test_a_picture_on_the_list_is_no_healthy_one(flair: Config) -> None:
    read = read_lgg(pictures.archive_path(flair), frozenset({"b_03"}))
    assert [n for n, h in zip(read.names, read.healthy, strict=True) if not h] == ["a_04", "a_05", "a_06", "b_03"]


def test_the_cache_holds_the_healthy_slices_alone(flair: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    none: dict[str, tuple[str, ...]] = dict.fromkeys(("shapes_validation", "shapes_test", "shapes_test_small"), ())
    split = Split(source="made up", seed=0, train=("a", "b"), validation=(), test=(), **none)
    monkeypatch.setattr(data, "load_split", lambda _: split)
    stack = cached_slices(flair, "train")
    assert stack.shape == (17, 96, 80)
    assert 0.3 < np.median(stack[stack > 0]) / 65535 < 0.5
    np.testing.assert_array_equal(cached_slices(flair, "train"), stack)


def test_the_hash_follows_what_is_healthy(flair: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = data_hash(flair, ("a", "b"))
    assert data_hash(flair, ("a", "b")) == before
    assert data_hash(flair, ("a",)) != before
    fewer = read_lgg(pictures.archive_path(flair), frozenset({"b_03"}))
    monkeypatch.setattr(pictures, "open_pictures", lambda _: fewer)
    assert data_hash(flair, ("a", "b")) != before


def test_findings_in_two_pictures_are_not_one() -> None:
    stack = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    spread = apart(stack)
    assert spread.shape == (5, 2, 2)
    np.testing.assert_array_equal(spread[::2], stack)
    assert np.isnan(spread[1::2]).all()


def test_pictures_have_no_tilted_copies() -> None:
    config = Config.load(CONFIGS / "headct.toml")
    with pytest.raises(ValidationError, match="no copies"):
        type(config.data).model_validate({**config.data.model_dump(), "copies": 3})


# ---- what is committed -------------------------------------------------------------------------


def test_no_patient_of_mednist_can_be_in_two_parts() -> None:
    """A patient's files lie within 33 of each other: two parts are further apart than that."""
    split = load_split("headct.json")
    part = {name: p for p in ("train", "validation", "test") for name in getattr(split, p)}
    names = sorted(part)
    for one, other in pairwise(names):
        if part[one] != part[other]:
            assert int(other[:6]) - int(one[-6:]) > BLOCK
    assert (len(split.train), len(split.validation), len(split.test)) == (162, 29, 28)


def test_the_patients_of_lgg_are_in_one_part_each() -> None:
    split = load_split("lgg_flair.json")
    assert (len(split.train), len(split.validation), len(split.test)) == (49, 12, 27)


@pytest.mark.parametrize(("name", "count"), [("headct-excluded.csv", 225), ("lgg-excluded.csv", 2)])
def test_exclusions_have_names_and_reasons(name: str, count: int) -> None:
    assert len(excluded_pictures(name)) == count


@pytest.mark.parametrize("name", ["headct", "flair"])
def test_a_configuration_says_what_its_bundle_is(name: str) -> None:
    config = Config.load(CONFIGS / f"{name}.toml")
    assert config.preprocessing.head_box is not None
    assert config.bundle.intended_use.startswith("Research use only")
    assert config.bundle.non_commercial is (name == "flair")
    assert (ROOT / "training" / "limits" / f"{name}.md").is_file()
