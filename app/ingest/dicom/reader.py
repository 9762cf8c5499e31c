"""Read the one MR or CT series among DICOM files into a scan.

highdicom derives the positions, pydicom decodes the pixels.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from app.dicom_attributes import silence_libraries
from app.errors import (
    InvalidGeometry,
    NoImageInArchive,
    NotAVolume,
    SeveralPatients,
    TooManyVoxels,
    TruncatedFile,
    WrongModality,
)
from app.ingest.dicom.acquisitions import check_overlaps, find_overlaps
from app.ingest.dicom.files import Header, hash_pixels, read_headers
from app.ingest.dicom.geometry import Arrangement, arrange_slices
from app.ingest.dicom.pixels import Frame, hash_values, read_frames
from app.ingest.dicom.resample import plan_grid, resample
from app.ingest.dicom.sequence import classify_sequence_file, read_scanner
from app.ingest.dicom.series import Stack, select_stack
from app.ingest.limits import Limits
from app.volume import Geometry, Scan, Source, Volume

_MODALITIES = ("MR", "CT")
# Other modalities whose code may be repeated in a message. The attribute of a damaged file can contain any text.
_KNOWN_MODALITIES = ("PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SC", "OPT", "SM", "ES", "SEG")
# One file can contain several volumes, for example echoes. This multiple of the voxels of one volume is decoded.
MAX_FILE_FACTOR = 4

_EXPECTED = "one MR or CT series of grey slices with a position in space."


def read_dicom(
    paths: Sequence[Path],
    series: str | None,
    geometry: Geometry,
    limits: Limits,
    sequences: Collection[str] = (),
) -> Scan:
    """Read the one series among DICOM files.

    Parameters
    ----------
    paths : sequence of Path
        DICOM files in any order. Files that are not slices of the series, and damaged files of other series, are
        left out and counted in the notes.
    series : str or None
        SeriesInstanceUID of the series to read if there are several.
    geometry : {"refuse", "resample"}
        Refuse or resample slices that are missing, tilted or unevenly spaced.
    limits : Limits
    sequences : collection of str
        Sequences of MR that the available models are trained on. Among several series, one of these is preferred.

    Raises
    ------
    SeveralPatients
        If the files name several patients.
    SeveralSeries, UnknownSeries
        If there are several series, or `series` is none of them.
    WrongModality, NotAVolume, NoImageInArchive, InvalidGeometry, IrregularSlices
        If the files are not a grey MR or CT volume of regular slices.
    UnsupportedPixels, TruncatedFile, TooManyVoxels, UnsafeArchive
        If the pixels cannot be decoded, or a file of the series is damaged.
    InvalidVoxels, ConstantVoxels
        If the voxels are not those of an image.
    """
    with silence_libraries():
        readable, damaged = read_headers(paths, limits)
        _refuse_several_patients(readable)
        headers, unplaced, left_out = _select_images(readable, len(damaged), limits)
        stack, excluded = select_stack(headers, series, sequences)
        _refuse_several_mosaics(stack)
        stack, overlaps = _leave_out_overlaps(stack, geometry)
        arrangement = arrange_slices(stack.planes)
        if geometry == "refuse":
            _check_complete(stack, arrangement, damaged, unplaced)
        head, grid = stack.head, None
        if arrangement.faults:
            grid = plan_grid([stack.planes[i] for i in arrangement.order], head.columns, head.rows)
            _check_size(math.prod(grid.shape), limits)
        _check_size(len(stack.frames) * head.rows * head.columns, limits)
        _check_file_sizes(stack, limits)
        sequence = classify_sequence_file(head.path, stack.frames[0][1])
        scanner = read_scanner(head.path)
        frames = [Frame(stack.frames[i][0].path, stack.frames[i][1], head.tiles) for i in arrangement.order]
        array, pixel_notes = read_frames(frames, head.rows, head.columns)
    affine = arrangement.affine
    notes = [*left_out, *excluded, *overlaps, *_stack_notes(stack), *arrangement.notes, *pixel_notes]
    if grid:
        notes += [*arrangement.faults, grid.note]
        array, affine = resample(array, grid), grid.affine
    source = Source(
        format="dicom",
        modality=_modality(head),
        sequences=sequence.weightings,
        contrast_agent=sequence.contrast_agent,
        instances=tuple(dict.fromkeys(frame.path for frame in frames)),
        frames=tuple(frame.index for frame in frames) if head.is_multi_frame else (),
        series_uid=head.series,
        resampled=grid is not None,
        scanner=scanner,
        notes=tuple(notes),
        warnings=tuple(_warn_of_lost_images(damaged.count(""))),
    )
    return Scan(Volume(array, affine), source)


def _warn_of_lost_images(damaged: int) -> Iterator[str]:
    """Yield a warning if the series of some damaged files is unknown: a lost end of the head leaves no gap."""
    if damaged:
        yield (
            f"Damaged or empty files were left out: {damaged}. If they belong to this series, a part of the head is "
            "missing."
        )


def _leave_out_overlaps(stack: Stack, geometry: Geometry) -> tuple[Stack, list[str]]:
    """Return the stack without the images that a longer acquisition shows, and notes that place them.

    Raises
    ------
    IrregularSlices
        If acquisitions overlap, and the caller did not choose to resample, or most images of one are repeats.
    """
    planes, size = stack.planes, (stack.head.rows, stack.head.columns)
    overlaps = find_overlaps(planes)
    check_overlaps(overlaps, planes, size, join=geometry == "resample")
    without = {int(index) for overlap in overlaps for index in overlap.images}
    frames = tuple(frame for index, frame in enumerate(stack.frames) if index not in without)
    notes = [
        f"Left out: {overlap.describe(planes, size)}. A longer acquisition of the series shows the same region."
        for overlap in overlaps
    ]
    return replace(stack, frames=frames), notes


def _check_complete(stack: Stack, arrangement: Arrangement, damaged: Sequence[str], unplaced: Sequence[Header]) -> None:
    """Raise an error if a file of the series is damaged or has no position, or its slices are not regular.

    Raises
    ------
    TruncatedFile, InvalidGeometry, IrregularSlices
    """
    head = stack.head
    own = [h for h in unplaced if (h.series, h.rows, h.columns) == (head.series, head.rows, head.columns)]
    if own:
        raise _no_position(own, len(own) + len({header.path for header, _, _ in stack.frames}))
    lost = damaged.count(stack.head.series) if stack.head.series else 0
    if lost:
        files = lost + len({header.path for header, _, _ in stack.frames})
        found = f"{lost} of {files} files of the series {'has' if lost == 1 else 'have'} a damaged header."
        raise TruncatedFile(
            " ".join([found, *arrangement.faults]),
            expected="every file of the series complete.",
            advice="Export the series again. To read the remaining slices, choose `--geometry resample` or "
            "`?geometry=resample`.",
        )
    others = sum(not series for series in damaged)
    hint = f"The missing slices may be among {others} damaged DICOM files." if others else ""
    arrangement.check_regular(hint)


def _select_images(
    headers: Sequence[Header], damaged: int, limits: Limits
) -> tuple[list[Header], list[Header], list[str]]:
    """Return the grey MR and CT images with a position, those without one, and notes that count all that is left out.

    If no image passes one of the tests, the error of that test is raised.
    """
    images = [header for header in headers if header.is_image]
    if damaged and not images:
        raise TruncatedFile(
            f"{damaged} of {damaged + len(headers)} DICOM files end inside the header, or the header contains a value "
            "that DICOM does not allow. No other file is an image.",
            expected=_EXPECTED,
            advice="Export the series again, and check that every file arrived complete.",
        )
    if not images:
        raise NoImageInArchive(
            f"None of {len(headers)} DICOM files contains an image.",
            expected=_EXPECTED,
            advice="Export the images of the series, not only its reports or its directory.",
        )
    without = len(headers) - len(images)
    remaining, unplaced = images, list[Header]()
    left_out = Counter({"damaged DICOM files": damaged, "DICOM files without an image": without})
    # Name in the notes of the images that fail a test, the test, and the error if all images fail it.
    for name, test, error in (
        ("images of other modalities", lambda h: h.modality in _MODALITIES, _wrong_modality),
        ("colour images", lambda h: h.is_grey, _only_colour),
        ("localizers", lambda h: not h.is_localizer, _only_localizers),
        ("Siemens mosaics without their private header", lambda h: not h.is_mosaic or h.tiles > 0, _only_mosaics),
        ("screenshots or images without a position", lambda h: h.is_placed, _no_position),
    ):
        passed = [header for header in remaining if test(header)]
        if not passed:
            raise error(remaining)
        left_out[name] = len(remaining) - len(passed)
        unplaced = [header for header in remaining if not header.is_placed and not header.is_screenshot]
        remaining = passed
    unique = _drop_duplicates(remaining, limits)
    left_out["duplicates of other files"] = len(remaining) - len(unique)
    notes = [f"Left out: {count} {name}." for name, count in left_out.items() if count]
    shared = len(unique) - len({header.instance or str(header.path) for header in unique})
    if shared:
        notes.append(
            f"{shared} images have the SOPInstanceUID of another image, but another position or other pixels. "
            "They are not duplicates, and none was left out."
        )
    return unique, unplaced, notes


def _drop_duplicates(headers: Sequence[Header], limits: Limits) -> list[Header]:
    """Return the first of all files that agree in SOPInstanceUID, position and pixels, in whatever transfer syntax.

    A file without a SOPInstanceUID is not a duplicate. An anonymiser can give one UID to all slices, so the UID alone
    does not decide.
    """
    groups: dict[object, list[Header]] = defaultdict(list)
    for header in headers:
        place = (header.instance, header.series, header.rows, header.columns, header.planes)
        groups[place if header.instance else header.path].append(header)
    kept = {header.path for group in groups.values() for header in _find_different(group, limits)}
    return [header for header in headers if header.path in kept]


def _find_different(group: Sequence[Header], limits: Limits) -> Iterable[Header]:
    """Return the first of all files with equal pixels. Pixels are decoded only if the stored ones differ."""
    if len(group) == 1:
        return group
    stored = {hash_pixels(header.path): header for header in reversed(group)}
    if len(stored) == 1:
        return stored.values()
    return {_hash_values(header, limits): header for header in reversed(stored.values())}.values()


def _hash_values(header: Header, limits: Limits) -> object:
    """Return a hash of the decoded pixels of a file. A file that is too large or damaged is equal to no other."""
    too_large = _count_voxels(header) > MAX_FILE_FACTOR * limits.max_voxels
    return header.path if too_large else hash_values(header.path) or header.path


def _refuse_several_patients(headers: Sequence[Header]) -> None:
    """Raise an error if the files name several patients.

    Raises
    ------
    SeveralPatients
    """
    details = zip(*(header.patient for header in headers), strict=True)
    names = ("PatientID", "PatientName", "PatientBirthDate")
    differ = [name for name, values in zip(names, details, strict=False) if len({*values} - {""}) > 1]
    if differ:
        raise SeveralPatients(
            f"The files contain several values of {' and '.join(differ)}.",
            expected="the files of one patient.",
            advice="Send the files of each patient separately. If they are of one patient, export the study again.",
        )


def _wrong_modality(headers: Sequence[Header]) -> WrongModality:
    names = sorted({header.modality for header in headers if header.modality in _KNOWN_MODALITIES})
    if not any(header.modality for header in headers):
        found = "The images state no modality."
    elif names:
        found = f"The modality of the images is {', '.join(names)}, not MR or CT."
    else:
        found = "The modality of the images is not MR or CT."
    return WrongModality(found, expected=_EXPECTED, advice="Send the MR or CT series.")


def _only_colour(_headers: Sequence[Header]) -> NotAVolume:
    return NotAVolume(
        "All images are in colour.",
        expected="one grey value for each pixel.",
        advice="Send the acquired series, not a colour map or a screenshot of it.",
    )


def _only_mosaics(_headers: Sequence[Header]) -> NotAVolume:
    return NotAVolume(
        "All images are Siemens mosaics (many slices side by side). The private header of Siemens, which contains the "
        "position of each slice, is missing. It was removed, or the software of the scanner (XA) does not write it.",
        expected="the element (0029,1010) of the block SIEMENS CSA HEADER, or one slice for each image or frame.",
        advice="Export the series without removing private elements. From software XA, export enhanced images or "
        "single slices.",
    )


def _only_localizers(_headers: Sequence[Header]) -> NotAVolume:
    return NotAVolume(
        "All images are localizers.",
        expected=_EXPECTED,
        advice="Send the series that was planned on the localizers.",
    )


def _no_position(headers: Sequence[Header], total: int = 0) -> InvalidGeometry:
    """Return the error for images without a position, of a series of `total` files if some have one."""
    invalid = sorted({keyword for header in headers for keyword in header.invalid})
    count = f"{len(headers)} of {total or len(headers)} images"
    if invalid:
        return InvalidGeometry(
            f"{' and '.join(invalid)} of {count} is not a list of numbers.",
            expected="decimal numbers with a point, as in DICOM PS3.5 6.2.",
            advice="Export the series again from the original.",
        )
    found = f"{count} of the series do not state their position, orientation and pixel spacing."
    if not total:
        found = f"None of {len(headers)} images states its position, orientation and pixel spacing."
    return InvalidGeometry(
        found,
        expected="ImagePositionPatient, ImageOrientationPatient and PixelSpacing in every slice.",
        advice="Send the acquired series, not screenshots of it.",
    )


def _refuse_several_mosaics(stack: Stack) -> None:
    """Raise `NotAVolume` for several mosaics, because each is a whole volume."""
    count = len({header.path for header, _, _ in stack.frames})
    if stack.head.tiles and count > 1:
        raise NotAVolume(
            f"The series is a time series: it contains {count} Siemens mosaics, and each is a whole volume of "
            f"{len(stack.head.planes)} slices.",
            expected="one mosaic, or one slice for each image.",
            advice="Send the structural series of the examination, or one mosaic alone.",
        )


def _stack_notes(stack: Stack) -> Iterator[str]:
    if stack.is_derived:
        yield "The images are derived from other images (ImageType DERIVED). They are not as acquired."
    if stack.head.tiles:
        yield f"The image is a Siemens mosaic: it contains {len(stack.frames)} slices side by side."


def _check_size(voxels: int, limits: Limits) -> None:
    if voxels > limits.max_voxels:
        raise TooManyVoxels(
            f"The series has {voxels} voxels.",
            expected=f"at most {limits.max_voxels} voxels.",
            advice="Send the series of the head alone, or a series of lower resolution.",
        )


def _check_file_sizes(stack: Stack, limits: Limits) -> None:
    """Raise an error if a file of the stack announces many more frames than the stack needs: all of them are decoded.

    Raises
    ------
    TooManyVoxels
    """
    for header in {header.path: header for header, _, _ in stack.frames}.values():
        voxels = _count_voxels(header)
        if voxels > MAX_FILE_FACTOR * limits.max_voxels:
            frames = voxels // (header.rows * header.columns)
            raise TooManyVoxels(
                f"A file of the series announces {frames} frames with {voxels} voxels.",
                expected=f"at most {MAX_FILE_FACTOR * limits.max_voxels} voxels in a file.",
                advice="Split the file into one file for each volume.",
            )


def _count_voxels(header: Header) -> int:
    """Return the number of voxels that a file announces."""
    return max(len(header.planes), header.tiles**2) * header.rows * header.columns


def _modality(header: Header) -> Literal["MR", "CT"]:
    return "CT" if header.modality == "CT" else "MR"
