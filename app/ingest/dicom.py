"""DICOM files -> one series -> a scan. Positions by highdicom, pixels by pydicom."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from app.errors import (
    InvalidGeometry,
    NoImageInArchive,
    NotAVolume,
    SeveralSeries,
    TooManyVoxels,
    UnknownSeries,
    WrongModality,
)
from app.ingest.headers import Header, Plane, read_header
from app.ingest.limits import Limits
from app.ingest.pixels import Frame, read_frames
from app.ingest.quiet import quiet
from app.ingest.stack import arrange
from app.volume import Scan, Source, Volume

# Beside a stack of at least this many slices, a shorter one is a scout, a key image or a leftover.
SHORTEST_STACK = 10
# Direction cosines of one stack agree within this; 0.06 degrees.
SAME_DIRECTION = 1e-3
# A list of series that a person can read.
MOST_LISTED = 10

_MODALITIES = ("MR", "CT")
# Other modalities whose names may be repeated in a message: anything else could be any text.
_KNOWN_MODALITIES = ("PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SC", "OPT", "SM", "ES", "SEG")

_EXPECTED = "one MR or CT series of grey slices with a place in space."


def read(paths: Sequence[Path], series: str | None, limits: Limits) -> Scan:
    """Read the one series among some DICOM files.

    Parameters
    ----------
    paths : sequence of Path
        DICOM files of any name and order; those that are no slices of the series are left out and
        counted in the notes.
    series : str or None
        SeriesInstanceUID to take, where there are several.

    Raises
    ------
    SeveralSeries, UnknownSeries
        The choice is not clear, or names nothing.
    WrongModality, NotAVolume, NoImageInArchive, InvalidGeometry, IrregularSlices
        The files are no grey MR or CT volume of regular slices.
    UnsupportedPixels, TruncatedFile, TooManyVoxels, UnsafeArchive
        The files cannot be decoded.
    InvalidVoxels, ConstantVoxels
        The voxels are not those of an image.
    """
    with quiet():
        headers, left_out = _sift([read_header(path, limits) for path in paths])
        chosen, dropped = _choose(headers, series)
        stack, scouts = _one_stack(chosen)
        order, affine, spacing_notes = arrange([plane for _, _, plane in stack])
        head = stack[0][0]
        _check_size(len(stack) * head.rows * head.columns, limits)
        frames = [Frame(stack[i][0].path, stack[i][1]) for i in order]
        array, pixel_notes = read_frames(frames, head.rows, head.columns)
    source = Source(
        format="dicom",
        modality=_modality(head),
        description=head.description,
        instances=tuple(dict.fromkeys(frame.path for frame in frames)),
        series_uid=head.series,
        notes=(*left_out, *dropped, *scouts, *spacing_notes, *pixel_notes),
    )
    return Scan(Volume(array, affine), source)


def _sift(headers: Sequence[Header]) -> tuple[list[Header], list[str]]:
    """Slices of MR and CT; the others are counted, or refused where nothing else is there."""
    images = [header for header in headers if header.is_image]
    if not images:
        raise NoImageInArchive(
            f"None of {len(headers)} DICOM files holds an image.",
            expected=_EXPECTED,
            advice="Export the images of the series, not only its reports or its directory.",
        )
    rest, left_out = list(images), Counter({"DICOM files without an image": len(headers) - len(images)})
    # Each test, and what to say of files that fail it, while others pass.
    for what, test, refusal in (
        ("images of other modalities", lambda h: h.modality in _MODALITIES, _wrong_modality),
        ("colour images", lambda h: h.is_grey, _colour),
        ("localizers", lambda h: not h.is_localizer, _only_localizers),
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
    return WrongModality(
        f"The images are not MR or CT{' but ' + ', '.join(names) if names else ''}.",
        expected=_EXPECTED,
        advice="Send the MR or CT series.",
    )


def _colour(headers: Sequence[Header]) -> NotAVolume:
    return NotAVolume(
        f"The {len(headers)} images are in colour.",
        expected="one grey value a pixel.",
        advice="Send the acquired series, not a colour map or a screenshot of it.",
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


def _choose(headers: Sequence[Header], series: str | None) -> tuple[list[Header], list[str]]:
    """The slices of one series."""
    groups: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        groups[header.series].append(header)
    if series is not None:
        if series not in groups:
            raise UnknownSeries(
                "No MR or CT slices have the SeriesInstanceUID that was asked for.",
                expected=_listed(groups),
                advice="Name one of these, or none where there is only one.",
            )
        return groups[series], []
    long, notes = _long_ones(groups, "series")
    if len(long) > 1:
        raise SeveralSeries(
            f"There are {len(long)} series of MR or CT slices.",
            expected="one, or the SeriesInstanceUID of the one to take.",
            advice=f"Name it (`--series UID`, `?series=UID`): {_listed(long)}",
        )
    return next(iter(long.values())), notes


def _listed(groups: dict[str, list[Header]]) -> str:
    ordered = sorted(groups.items(), key=lambda item: -_slices(item[1]))
    listed = [f"{uid or 'without UID'} ({_slices(of)} {of[0].modality} slices)" for uid, of in ordered[:MOST_LISTED]]
    more = f" and {len(ordered) - MOST_LISTED} more" if len(ordered) > MOST_LISTED else ""
    return "; ".join(listed) + more + "."


def _slices(headers: Iterable[Header]) -> int:
    return sum(len(header.planes) for header in headers)


def _long_ones(groups: dict[str, list[Header]], what: str) -> tuple[dict[str, list[Header]], list[str]]:
    """Without the short ones, where a long one is among them."""
    long = {key: of for key, of in groups.items() if _slices(of) >= SHORTEST_STACK}
    if not long or len(long) == len(groups):
        return groups, []
    left = len(groups) - len(long)
    return long, [f"Left out: {left} {what} of fewer than {SHORTEST_STACK} slices."]


Placed = tuple[Header, int, Plane]


def _one_stack(headers: Sequence[Header]) -> tuple[list[Placed], list[str]]:
    """Frames of one size and orientation."""
    if any(header.is_mosaic for header in headers):
        raise NotAVolume(
            "The images are Siemens mosaics: each shows all slices of one moment of a time series side by side.",
            expected="one slice an image.",
            advice="Send the structural series of the examination.",
        )
    stacks: list[list[Placed]] = []
    for header in headers:
        for index, plane in enumerate(header.planes):
            assert plane is not None, "_sift lets only placed frames through"
            home = next((stack for stack in stacks if _belongs(header, plane, stack[0])), None)
            if home is None:
                stacks.append([(header, index, plane)])
            else:
                home.append((header, index, plane))
    long = [stack for stack in stacks if len(stack) >= SHORTEST_STACK] or stacks
    if len(long) > 1:
        sizes = sorted((len(stack) for stack in long), reverse=True)[:MOST_LISTED]
        raise NotAVolume(
            f"The series holds {len(long)} stacks of slices that differ in orientation or size, "
            f"of {', '.join(map(str, sizes))} slices.",
            expected="slices of one orientation and size.",
            advice="Send one of the stacks alone.",
        )
    left = sum(len(stack) for stack in stacks) - len(long[0])
    notes = [f"Left out: {left} slices of the series in another orientation or size."] if left else []
    return long[0], notes


def _belongs(header: Header, plane: Plane, other: Placed) -> bool:
    first, _, reference = other
    return (
        (header.rows, header.columns) == (first.rows, first.columns)
        and header.frame_of_reference == first.frame_of_reference
        and np.allclose(plane.orientation, reference.orientation, rtol=0, atol=SAME_DIRECTION)
        and np.allclose(plane.spacing, reference.spacing, rtol=SAME_DIRECTION, atol=0)
    )


def _check_size(voxels: int, limits: Limits) -> None:
    if voxels > limits.max_voxels:
        raise TooManyVoxels(
            f"The series has {voxels} voxels.",
            expected=f"at most {limits.max_voxels} voxels.",
            advice="Send the series of the head alone, or one of lower resolution.",
        )


def _modality(header: Header) -> Literal["MR", "CT"]:
    return "CT" if header.modality == "CT" else "MR"
