"""DICOM files -> one series -> a scan. Positions by highdicom, pixels by pydicom."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from app.errors import InvalidGeometry, NoImageInArchive, NotAVolume, TooManyVoxels, TruncatedFile, WrongModality
from app.ingest.headers import Header, read_headers
from app.ingest.limits import Limits
from app.ingest.pixels import Frame, read_frames
from app.ingest.quiet import quiet
from app.ingest.resample import resample, target
from app.ingest.sequence import said_by
from app.ingest.series import Stack, choose
from app.ingest.stack import Arrangement, arrange
from app.volume import Geometry, Scan, Source, Volume

_MODALITIES = ("MR", "CT")
# Other modalities whose names may be repeated in a message: anything else could be any text.
_KNOWN_MODALITIES = ("PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SC", "OPT", "SM", "ES", "SEG")

_EXPECTED = "one MR or CT series of grey slices with a place in space."


def read(paths: Sequence[Path], series: str | None, geometry: Geometry, limits: Limits) -> Scan:
    """Read the one series among some DICOM files.

    Parameters
    ----------
    paths : sequence of Path
        DICOM files of any name and order; those that are no slices of the series, and damaged ones of
        other series, are left out and counted in the notes.
    series : str or None
        SeriesInstanceUID to take, where there are several.
    geometry : {"refuse", "resample"}
        What to do with slices that are missing, tilted or unevenly spaced.

    Raises
    ------
    SeveralSeries, UnknownSeries
        The choice is not clear, or names nothing.
    WrongModality, NotAVolume, NoImageInArchive, InvalidGeometry, IrregularSlices
        The files are no grey MR or CT volume of regular slices.
    UnsupportedPixels, TruncatedFile, TooManyVoxels, UnsafeArchive
        The files cannot be decoded, or one of the series is damaged.
    InvalidVoxels, ConstantVoxels
        The voxels are not those of an image.
    """
    with quiet():
        readable, damaged = read_headers(paths, limits)
        headers, left_out = _sift(readable, len(damaged))
        stack, dropped = choose(headers, series)
        _refuse_mosaics(stack)
        arranged = arrange(stack.planes)
        if geometry == "refuse":
            _check_whole(stack, arranged, damaged)
        head, onto = stack.head, None
        if arranged.faults:
            onto = target([stack.planes[i] for i in arranged.order], head.columns, head.rows)
            _check_size(math.prod(onto.shape), limits)
        _check_size(len(stack.frames) * head.rows * head.columns, limits)
        sequence = said_by(head.path, stack.frames[0][1])
        frames = [Frame(stack.frames[i][0].path, stack.frames[i][1], head.tiles) for i in arranged.order]
        array, pixel_notes = read_frames(frames, head.rows, head.columns)
    affine, notes = arranged.affine, [*left_out, *dropped, *_notes(stack), *arranged.notes, *pixel_notes]
    if onto:
        notes += [*arranged.faults, onto.note]
        array, affine = resample(array, onto), onto.affine
    source = Source(
        format="dicom",
        modality=_modality(head),
        sequences=sequence.weightings,
        contrast_agent=sequence.contrast_agent,
        instances=tuple(dict.fromkeys(frame.path for frame in frames)),
        frames=tuple(frame.index for frame in frames) if head.is_multi_frame else (),
        series_uid=head.series,
        resampled=onto is not None,
        notes=tuple(notes),
    )
    return Scan(Volume(array, affine), source)


def _check_whole(stack: Stack, arranged: Arrangement, damaged: Sequence[str]) -> None:
    """Refuse a series of which a file is damaged, or a slice missing.

    Raises
    ------
    TruncatedFile, IrregularSlices
    """
    lost = damaged.count(stack.head.series) if stack.head.series else 0
    if lost:
        files = lost + len({header.path for header, _, _ in stack.frames})
        found = f"{lost} of {files} files of the series {'is' if lost == 1 else 'are'} damaged in the header."
        raise TruncatedFile(
            " ".join([found, *arranged.faults]),
            expected="every file of the series whole.",
            advice="Export the series again; or choose to go on with the slices that are left: `--geometry resample`, "
            "`?geometry=resample`.",
        )
    others = sum(not series for series in damaged)
    arranged.check_regular(f"{others} damaged DICOM files may be what is missing." if others else "")


def _sift(headers: Sequence[Header], damaged: int) -> tuple[list[Header], list[str]]:
    """Slices of MR and CT; the others are counted, or refused where nothing else is there."""
    images = [header for header in headers if header.is_image]
    if damaged and not images:
        raise TruncatedFile(
            f"{damaged} of {damaged + len(headers)} DICOM files break off inside the header, or hold a value there "
            "that DICOM does not allow; no other is an image.",
            expected=_EXPECTED,
            advice="Export the series again, and check that every file arrived whole.",
        )
    if not images:
        raise NoImageInArchive(
            f"None of {len(headers)} DICOM files holds an image.",
            expected=_EXPECTED,
            advice="Export the images of the series, not only its reports or its directory.",
        )
    without = len(headers) - len(images)
    rest, left_out = list(images), Counter({"damaged DICOM files": damaged, "DICOM files without an image": without})
    # Each test, and what to say of files that fail it, while others pass.
    for what, test, refusal in (
        ("images of other modalities", lambda h: h.modality in _MODALITIES, _wrong_modality),
        ("colour images", lambda h: h.is_grey, _colour),
        ("localizers", lambda h: not h.is_localizer, _only_localizers),
        ("Siemens mosaics without their private header", lambda h: not h.is_mosaic or h.tiles > 0, _blind_mosaics),
        ("screenshots or images without a position", lambda h: h.is_placed, _no_position),
    ):
        passed = [header for header in rest if test(header)]
        if not passed:
            raise refusal(rest)
        left_out[what] = len(rest) - len(passed)
        rest = passed
    unique = {header.instance or str(header.path): header for header in reversed(rest)}
    left_out["duplicates of other files"] = len(rest) - len(unique)
    notes = [f"Left out: {count} {what}." for what, count in left_out.items() if count]
    return list(reversed(unique.values())), notes


def _wrong_modality(headers: Sequence[Header]) -> WrongModality:
    names = sorted({header.modality for header in headers if header.modality in _KNOWN_MODALITIES})
    stated = any(header.modality for header in headers)
    found = f"The images are not MR or CT{' but ' + ', '.join(names) if names else ''}."
    return WrongModality(
        found if stated else "The images state no modality.",
        expected=_EXPECTED,
        advice="Send the MR or CT series.",
    )


def _colour(headers: Sequence[Header]) -> NotAVolume:
    return NotAVolume(
        f"The {len(headers)} images are in colour.",
        expected="one grey value a pixel.",
        advice="Send the acquired series, not a colour map or a screenshot of it.",
    )


def _blind_mosaics(headers: Sequence[Header]) -> NotAVolume:
    return NotAVolume(
        f"The {len(headers)} images are Siemens mosaics, many slices side by side, and Siemens' private header that "
        "tells where each lies is missing: it was removed, or the scanner's software (XA) writes none.",
        expected="the element (0029,1010) of the block SIEMENS CSA HEADER, or one slice an image or a frame.",
        advice="Export the series without removing private elements; from software XA as enhanced images or single "
        "slices.",
    )


def _only_localizers(headers: Sequence[Header]) -> NotAVolume:
    return NotAVolume(
        f"The {len(headers)} images are localizers.",
        expected=_EXPECTED,
        advice="Send the series that was planned on them.",
    )


def _no_position(headers: Sequence[Header]) -> InvalidGeometry:
    return InvalidGeometry(
        f"None of {len(headers)} images states its position, orientation and pixel spacing.",
        expected="ImagePositionPatient, ImageOrientationPatient and PixelSpacing in every slice.",
        advice="Send the acquired series, not screenshots of it.",
    )


def _refuse_mosaics(stack: Stack) -> None:
    """One mosaic is a volume, several are as many of them."""
    count = len({header.path for header, _, _ in stack.frames})
    if stack.head.tiles and count > 1:
        raise NotAVolume(
            f"The series holds {count} Siemens mosaics, each a whole volume of {len(stack.head.planes)} slices: a time "
            "series.",
            expected="one mosaic, or one slice an image.",
            advice="Send the structural series of the examination, or one mosaic alone.",
        )


def _notes(stack: Stack) -> Iterator[str]:
    if stack.is_derived:
        yield "The images are derived from others (ImageType DERIVED), not as they were acquired."
    if stack.head.tiles:
        yield f"A Siemens mosaic: one image with {len(stack.frames)} slices side by side."


def _check_size(voxels: int, limits: Limits) -> None:
    if voxels > limits.max_voxels:
        raise TooManyVoxels(
            f"The series has {voxels} voxels.",
            expected=f"at most {limits.max_voxels} voxels.",
            advice="Send the series of the head alone, or one of lower resolution.",
        )


def _modality(header: Header) -> Literal["MR", "CT"]:
    return "CT" if header.modality == "CT" else "MR"
