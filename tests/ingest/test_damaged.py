"""Files that arrived broken: beside the series they cost nothing, of the series they are missed."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEGLSLossless

from app.errors import CounterpartError, IrregularSlices, TruncatedFile
from app.volume import Volume
from tests.proofs.fuzz_ingest import held_mb
from tests.ingest.conftest import Read
from tests.support.dicom import SECRET, Series, datasets, scanned, write_series, zipped
from tests.support.encoded import stored

# Little endian, as they stand in the file: Rows, PixelSpacing, PixelData.
ROWS, SPACING, PIXELS = b"\x28\0\x10\0US", b"\x28\0\x30\0DS", b"\xe0\x7f\x10\0"
LEFT_OUT = "Left out: 1 damaged DICOM files."


def cut(path: Path, at: bytes | int) -> None:
    """End a file before an element, or after some bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: at if isinstance(at, int) else content.index(at)])


def spoil(path: Path) -> None:
    """A value that cannot be, and that holds the patient's name."""
    dataset = dcmread(path)
    dataset["Rows"].VR = "LO"
    dataset.Rows = SECRET
    dataset.save_as(path)


def one_of_another_series(folder: Path, volume: Volume) -> Path:
    """A slice beside the series in `folder`/s."""
    first = write_series(folder / "other", volume, Series(name="other"))[0]
    return first.rename(folder / "s" / "stray")


@pytest.mark.parametrize("at", [0x90, 200, ROWS, SPACING])
def test_a_stray_file_that_breaks_off_is_left_out_and_counted(
    tmp_path: Path, read_scan: Read, volume: Volume, at: bytes | int
) -> None:
    write_series(tmp_path / "s", volume)
    stray = one_of_another_series(tmp_path, volume)
    cut(stray, at)
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, scanned(volume, "axial")[0])
    assert scan.source.notes == (LEFT_OUT,)
    packed = zipped(tmp_path / "s.zip", [path for path in (tmp_path / "s").rglob("*") if path.is_file()])
    assert read_scan(packed).source.notes == (LEFT_OUT,)


def test_a_stray_file_with_an_impossible_value_is_left_out_and_not_told(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    write_series(tmp_path / "s", volume)
    for path in write_series(tmp_path / "s" / "stray", volume, Series(name="stray")):
        spoil(path)
    scan = read_scan(tmp_path / "s")
    assert scan.source.notes == ("Left out: 14 damaged DICOM files.",)


@pytest.mark.parametrize(
    ("k", "place"),
    [(7, " Slice 8 of 14 is missing: gap of 4.0 mm between 7 and 9 (counted from the feet up)."), (0, ""), (13, "")],
)
@pytest.mark.parametrize("at", [ROWS, SPACING, None])
def test_a_damaged_file_of_the_series_is_refused_with_its_place(
    tmp_path: Path, read_scan: Read, volume: Volume, k: int, place: str, *, at: bytes | None
) -> None:
    """At either end there is no gap to see: its SeriesInstanceUID gives it away."""
    paths = write_series(tmp_path / "s", volume)
    if at is None:
        spoil(paths[k])
    else:
        cut(paths[k], at)
    with pytest.raises(TruncatedFile) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.found == "1 of 14 files of the series is damaged in the header." + place
    assert SECRET not in str(refused.value)


def test_what_is_left_is_read_by_choice(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    paths = write_series(tmp_path / "s", volume)
    cut(paths[7], ROWS)
    scan = read_scan(tmp_path / "s", geometry="resample")
    assert scan.volume.shape == (32, 34, 14)
    assert len(scan.source.instances) == 13
    assert scan.source.notes[0] == LEFT_OUT
    assert scan.source.notes[1].startswith("Slice 8 of 14 is missing")
    expected = scanned(volume, "axial")[0]
    np.testing.assert_allclose(scan.volume.array[..., 6], expected[..., 6], atol=1e-3)
    np.testing.assert_allclose(scan.volume.array[..., 7], (expected[..., 6] + expected[..., 8]) / 2, atol=1e-3)


def test_a_gap_beside_a_file_that_says_nothing_of_itself(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    cut(write_series(tmp_path / "s", volume)[7], 200)
    with pytest.raises(IrregularSlices) as refused:
        read_scan(tmp_path / "s")
    place = "Slice 8 of 14 is missing: gap of 4.0 mm between 7 and 9 (counted from the feet up)."
    assert refused.value.found == f"{place} 1 damaged DICOM files may be what is missing."


def test_pixels_that_are_damaged_are_refused_with_their_slice(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    paths = write_series(tmp_path / "s", volume)
    content = paths[8].read_bytes()
    paths[8].write_bytes(content[: content.index(PIXELS) + 100])
    with pytest.raises(TruncatedFile, match="pixel data of slice 9 of 14 is incomplete or damaged"):
        read_scan(tmp_path / "s")


def test_damaged_pixels_of_another_series_are_never_looked_at(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_series(tmp_path / "s", volume)
    cut(one_of_another_series(tmp_path, volume), -1000)
    scan = read_scan(tmp_path / "s")
    assert scan.source.notes == ("Left out: 1 stacks of fewer than 10 slices.",)


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_but_damaged_files(tmp_path: Path, read_scan: Read, volume: Volume, count: int) -> None:
    paths = write_series(tmp_path / "s", volume)
    for path in paths[:count]:
        cut(path, ROWS)
    for path in paths[count:]:
        path.unlink()
    with pytest.raises(TruncatedFile) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.found.startswith(f"{count} of {count} DICOM files break off inside the header")


def test_every_place_to_break_off_is_seen(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    """A last slice that is cut anywhere in its header never makes the scan silently shorter."""
    last = write_series(tmp_path / "s", volume)[-1]
    content = last.read_bytes()
    ends, series_at = content.index(PIXELS), content.index(b"\x20\0\x0e\0UI")
    outcomes = set()
    for length in range(132, ends, 37):
        last.write_bytes(content[:length])
        try:
            notes = read_scan(tmp_path / "s").source.notes
        except CounterpartError as error:
            outcomes.add(error.code)
            assert length > series_at
        else:
            assert notes == (LEFT_OUT,)
            assert length < series_at + 80  # its series is not readable yet
    # Whole but for its pixels, it is told as a slice that has none.
    assert outcomes == {"truncated_file", "no_image_in_archive"}


def test_a_codestream_that_breaks_off_leaves_no_memory_behind(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    dataset = datasets(volume)[0]
    stored(dataset, np.random.default_rng(0).integers(0, 4096, (1, 512, 512))[0], 12, signed=False)
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(tmp_path / "broken.dcm")

    def refused(times: int) -> float:
        for _ in range(times):
            with pytest.raises(CounterpartError):
                read_scan(tmp_path / "broken.dcm")
        return held_mb()

    before = refused(10)
    # GDCM keeps the 200 kB of each: 8 MB.
    assert refused(40) - before < 2
