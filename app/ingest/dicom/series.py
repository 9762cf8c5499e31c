"""Select the one stack of slices to read among the frames of many files.

The frames of a series are grouped into stacks: frames of one size, orientation and spacing and, if several frames
share their positions, of one echo, b-value and component. Then each rule of `EXCLUSION_RULES` leaves out the stacks
that it describes, as long as other stacks remain.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from app.errors import NotAVolume, SeveralSeries, UnknownSeries
from app.ingest.dicom.files import Header
from app.ingest.dicom.geometry import AcquisitionKey, Plane, anatomical_plane, count_images_per_position

# A file, the index of a frame in it, and the position of the frame.
LocatedFrame = tuple[Header, int, Plane]

# A stack shorter than this, beside a longer one, is a scout, a key image or a leftover.
MIN_SLICES = 10
# Direction cosines of one stack agree within this: 0.06 degrees.
DIRECTION_TOLERANCE = 1e-3
# A longer list of series is not readable in a message.
MAX_LISTED = 10
# Scouts have three orientations, rotating projections some dozens. Each frame is compared with all stacks.
MAX_STACKS = 100


@dataclass(frozen=True)
class Stack:
    """Frames that may be one volume.

    Attributes
    ----------
    name : str
        Value for `?series=`: the SeriesInstanceUID, with "/2" for the second of several stacks of a series.
    frames : tuple of (Header, int, Plane)
        File, index of the frame in the file, and position of the frame.
    """

    name: str
    frames: tuple[LocatedFrame, ...]

    @property
    def head(self) -> Header:
        """Header of the first file."""
        return self.frames[0][0]

    @property
    def planes(self) -> list[Plane]:
        return [plane for _, _, plane in self.frames]

    @property
    def is_derived(self) -> bool:
        return all(header.is_derived for header, _, _ in self.frames)

    @property
    def is_time_series(self) -> bool:
        """True if there are several images at every position."""
        return bool(count_images_per_position(self.planes).min() > 1)

    def __str__(self) -> str:
        keys = {plane.key for plane in self.planes}
        parts = [f"{len(self.frames)} {self.head.modality} slices", anatomical_plane(self.frames[0][2])]
        parts += [str(keys.pop())] if len(keys) == 1 else []
        parts += ["derived"] if self.is_derived else []
        return f"{self.name or 'without UID'} ({', '.join(filter(None, parts))})"


# Name of the excluded stacks in the notes, and the test for them.
EXCLUSION_RULES: tuple[tuple[str, Callable[[Stack], bool]], ...] = (
    (f"stacks of fewer than {MIN_SLICES} slices", lambda stack: len(stack.frames) < MIN_SLICES),
    ("time series", lambda stack: stack.is_time_series),
    ("phase, real or imaginary stacks", lambda stack: all(plane.key.component for plane in stack.planes)),
    ("derived stacks", lambda stack: stack.is_derived),
)


def select_stack(headers: Sequence[Header], series: str | None) -> tuple[Stack, list[str]]:
    """Select the stack to read.

    Parameters
    ----------
    headers : sequence of Header
        Grey MR and CT images in which every frame has a position.
    series : str or None
        SeriesInstanceUID, or with "/2" its second stack, as `SeveralSeries` lists them.

    Returns
    -------
    stack : Stack
    notes : list of str
        Sentences that count the stacks left out.

    Raises
    ------
    SeveralSeries
        If more than one stack remains.
    UnknownSeries
        If `series` names no stack.
    NotAVolume
        If the frames have too many orientations.
    """
    files: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        files[header.series].append(header)
    stacks = [stack for uid, members in files.items() for stack in _group_into_stacks(uid, members)]
    if series is not None:
        named = [stack for stack in stacks if series in {stack.name, stack.head.series}]
        if not named:
            raise UnknownSeries(
                "No MR or CT slices have the requested SeriesInstanceUID.",
                expected=_list_stacks(stacks),
                advice="Name one of these. If there is only one, no name is needed.",
            )
        stacks = named
    remaining, notes = _apply_rules(stacks)
    if len(remaining) > 1:
        if len({stack.head.series for stack in remaining}) > 1:
            found = f"There are {len(remaining)} MR or CT series."
        else:
            found = f"One series contains {len(remaining)} stacks of slices that differ in position, size or type."
        raise SeveralSeries(
            found,
            expected="one series, or the name of the series to read.",
            advice=f"Name one with `--series` or `?series=`: {_list_stacks(remaining)}",
        )
    return remaining[0], notes


def _apply_rules(stacks: list[Stack]) -> tuple[list[Stack], list[str]]:
    remaining, left_out = stacks, Counter[str]()
    for name, is_excluded in EXCLUSION_RULES:
        kept = [stack for stack in remaining if not is_excluded(stack)]
        if kept:
            left_out[name] = len(remaining) - len(kept)
            remaining = kept
    return remaining, [f"Left out: {count} {name}." for name, count in left_out.items() if count]


def _list_stacks(stacks: Iterable[Stack]) -> str:
    ordered = sorted(stacks, key=lambda stack: -len(stack.frames))
    more = f" and {len(ordered) - MAX_LISTED} more" if len(ordered) > MAX_LISTED else ""
    return "; ".join(map(str, ordered[:MAX_LISTED])) + more + "."


def _group_into_stacks(uid: str, headers: Sequence[Header]) -> list[Stack]:
    """Return the stacks of one series, the longest first."""
    groups = [frames for group in _group_by_orientation(headers) for frames in _group_by_key(group)]
    groups.sort(key=lambda frames: -len(frames))
    if len(groups) == 1:
        return [Stack(uid, tuple(groups[0]))]
    return [Stack(f"{uid}/{i}", tuple(frames)) for i, frames in enumerate(groups, 1)]


def _group_by_orientation(headers: Sequence[Header]) -> list[list[LocatedFrame]]:
    """Group frames by size, frame of reference, orientation and spacing."""
    groups: list[list[LocatedFrame]] = []
    for header in headers:
        for index, plane in enumerate(header.planes):
            assert plane is not None, "frames without a position were left out before"
            group = next((group for group in groups if _belongs_to(header, plane, group[0])), None)
            if group is not None:
                group.append((header, index, plane))
            elif len(groups) < MAX_STACKS:
                groups.append([(header, index, plane)])
            else:
                raise NotAVolume(
                    f"The images of one series have more than {MAX_STACKS} orientations or sizes.",
                    expected="slices of one orientation and size.",
                    advice="Send the acquired series, not projections or screenshots of it.",
                )
    return groups


def _belongs_to(header: Header, plane: Plane, other: LocatedFrame) -> bool:
    first, _, reference = other
    return (
        (header.rows, header.columns, header.tiles) == (first.rows, first.columns, first.tiles)
        and header.frame_of_reference == first.frame_of_reference
        and np.allclose(plane.orientation, reference.orientation, rtol=0, atol=DIRECTION_TOLERANCE)
        and np.allclose(plane.spacing, reference.spacing, rtol=DIRECTION_TOLERANCE, atol=0)
    )


def _group_by_key(frames: list[LocatedFrame]) -> list[list[LocatedFrame]]:
    """Group frames that share their positions by echo, b-value and component.

    Frames at different positions stay in one group, because their echo times may differ by rounding.
    """
    if count_images_per_position([plane for _, _, plane in frames]).max() == 1:
        return [frames]
    groups: dict[AcquisitionKey, list[LocatedFrame]] = defaultdict(list)
    for frame in frames:
        groups[frame[2].key].append(frame)
    return list(groups.values())
