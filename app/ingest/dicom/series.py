"""Select the one stack of slices to read among the frames of many files.

The frames of a series are grouped into stacks: frames of one size, orientation and spacing and, if several frames
share their positions, of one echo, b-value, component and contrast. Groups that form one regular stack together are
joined. Then each rule of `EXCLUSION_RULES` leaves out the stacks that it describes, as long as other stacks remain. A
short stack is left out only if it crosses the selected stack or lies inside it.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from app.errors import CounterpartError, NotAVolume, SeveralSeries, UnknownSeries
from app.ingest.dicom.description import describe_series_file
from app.ingest.dicom.files import Header
from app.ingest.dicom.geometry import (
    AcquisitionKey,
    Plane,
    anatomical_plane,
    arrange_slices,
    count_images_per_position,
    crosses_or_lies_inside,
    describe_place,
    largest_gap,
)
from app.ingest.dicom.sequence import SequenceInfo, classify_sequence_file
from app.volume import WITH_AGENT

# A file, the index of a frame in it, and the position of the frame.
LocatedFrame = tuple[Header, int, Plane]

# A stack shorter than this, beside a longer one, is a scout, a key image or a leftover.
MIN_SLICES = 10
# Direction cosines of one stack agree within this: 0.06 degrees.
DIRECTION_TOLERANCE = 1e-3
# Groups whose direction cosines agree within this are joined if they form one regular stack: 0.14 degrees. The corner
# of an image of 250 mm is then off by 0.6 mm, less than a voxel.
JITTER_TOLERANCE = 2.5e-3
# A longer list of series is not readable in a message.
MAX_LISTED = 10
# Scouts have three orientations, rotating projections some dozens. Each frame is compared with all stacks.
MAX_STACKS = 100
# Parts of ImageType values of images that were computed from a volume by a projection or a cut.
REFORMATS = ("MPR", "MIP", "REFORMAT", "PROJECTION", "SUBTRACT", "CPR", "SECONDARY")


@dataclass(frozen=True)
class Stack:
    """Frames that may be one volume.

    Attributes
    ----------
    name : str
        Value for `?series=`: the SeriesInstanceUID, with "/2" for the second of several stacks of a series.
    frames : tuple of (Header, int, Plane)
        File, index of the frame in the file, and position of the frame.
    notes : tuple of str
        Sentences about groups of frames that were joined.
    """

    name: str
    frames: tuple[LocatedFrame, ...]
    notes: tuple[str, ...] = ()

    @property
    def head(self) -> Header:
        """Header of the first file."""
        return self.frames[0][0]

    @property
    def planes(self) -> list[Plane]:
        return [plane for _, _, plane in self.frames]

    @property
    def is_short(self) -> bool:
        return len(self.frames) < MIN_SLICES

    @property
    def is_derived(self) -> bool:
        return all(header.is_derived for header, _, _ in self.frames)

    @property
    def is_reformatted(self) -> bool:
        """True if the images were computed from a volume by a projection or a cut."""
        return any(part in value for value in self.head.image_type for part in REFORMATS)

    @property
    def is_time_series(self) -> bool:
        """True if there are several images at every position."""
        return bool(count_images_per_position(self.planes).min() > 1)

    @cached_property
    def sequence(self) -> SequenceInfo:
        """Sequence of the first frame."""
        header, index, _ = self.frames[0]
        return classify_sequence_file(header.path, index)

    def fit(self, sequences: Collection[str]) -> int | None:
        """Return how well an MR stack fits one of the sequences that models are trained on.

        Returns
        -------
        int or None
            2 if sequence and contrast agent agree, 1 if only the sequence agrees, 0 if the header states no sequence,
            -1 if it states another one. None for a CT, and if there are no sequences.
        """
        if self.head.modality == "CT" or not sequences:
            return None
        stated = self.sequence.weightings
        if not stated:
            return 0
        suffix, other = ("", WITH_AGENT) if not self.sequence.contrast_agent else (WITH_AGENT, "")
        if any(name + suffix in sequences for name in stated):
            return 2
        return 1 if any(name + other in sequences for name in stated) else -1

    def covers(self, other: "Stack") -> bool:
        """Return True if another stack crosses this one or lies inside it, so that it shows nothing else."""
        sizes = [(stack.head.rows, stack.head.columns) for stack in (self, other)]
        same_series = self.head.series == other.head.series
        return crosses_or_lies_inside(other.planes, sizes[1], self.planes, sizes[0], may_fill_gaps=not same_series)

    def describe(self) -> str:
        """Return number, kind and place of the slices, for a note."""
        return f"{len(self.frames)} slices, {describe_place(self.planes, self.head.rows, self.head.columns)}"

    def __str__(self) -> str:
        keys = {plane.key for plane in self.planes}
        thickness = self.frames[0][2].thickness
        parts = [f"{len(self.frames)} {self.head.modality} slices", anatomical_plane(self.frames[0][2])]
        parts += [str(keys.pop())] if len(keys) == 1 else []
        parts += ["derived"] if self.is_derived else []
        parts += [f"{thickness:g} mm thick"] if thickness else []
        parts += self.sequence.weightings if self.head.modality == "MR" else []
        parts += ["contrast agent"] if self.sequence.contrast_agent else []
        parts += describe_series_file(self.head.path)
        return f"{self.name or 'without UID'} ({', '.join(filter(None, dict.fromkeys(parts)))})"


# Arguments: the stack, all stacks that remain, and the sequences that models are trained on.
ExclusionTest = Callable[[Stack, Sequence[Stack], Collection[str]], bool]


def _has_other_sequence(stack: Stack, stacks: Sequence[Stack], sequences: Collection[str]) -> bool:
    """Return True if the stack states another sequence or contrast agent than a stack that fits a model."""
    fit, best = stack.fit(sequences), _best_fit(stacks, sequences)
    return fit is not None and ((fit < 0 < best) or (fit == 1 and best > 1))


def _is_less_than_acquired(stack: Stack, stacks: Sequence[Stack], sequences: Collection[str]) -> bool:
    """Return True for a derived stack, unless it fits a model as well as acquired ones do.

    The uniform image of MP2RAGE and a corrected MPRAGE are derived, but they are the structural image of a study.
    """
    if not stack.is_derived or stack.is_reformatted:
        return stack.is_derived
    acquired = [other for other in stacks if not other.is_derived]
    fit = stack.fit(sequences)
    return fit is None or fit < 1 or fit < _best_fit(acquired, sequences)


def _best_fit(stacks: Iterable[Stack], sequences: Collection[str]) -> int:
    fits = (stack.fit(sequences) for stack in stacks)
    return max((fit for fit in fits if fit is not None), default=-1)


# Name of the excluded stacks in the notes, and the test for them.
EXCLUSION_RULES: tuple[tuple[str, ExclusionTest], ...] = (
    (f"stacks of fewer than {MIN_SLICES} slices", lambda stack, *_: stack.is_short),
    ("time series", lambda stack, *_: stack.is_time_series),
    ("phase, real or imaginary stacks", lambda stack, *_: all(plane.key.component for plane in stack.planes)),
    ("stacks of another sequence or contrast agent than a model's", _has_other_sequence),
    ("derived stacks", _is_less_than_acquired),
)


def select_stack(
    headers: Sequence[Header], series: str | None, sequences: Collection[str] = ()
) -> tuple[Stack, list[str]]:
    """Select the stack to read.

    Parameters
    ----------
    headers : sequence of Header
        Grey MR and CT images in which every frame has a position.
    series : str or None
        SeriesInstanceUID, or with "/2" its second stack, as `SeveralSeries` lists them.
    sequences : collection of str
        Sequences of MR that the available models are trained on. If there are none, the sequence decides nothing.

    Returns
    -------
    stack : Stack
    notes : list of str
        Sentences that count and place the stacks left out.

    Raises
    ------
    SeveralSeries
        If more than one stack remains, or a stack that was left out may continue the remaining one.
    UnknownSeries
        If `series` names no stack.
    NotAVolume
        If the frames have too many orientations.
    """
    files: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        files[header.series].append(header)
    merged = _merge_single_slices(files)
    stacks = [merged] if merged else []
    names = {header.series for header, _, _ in merged.frames} if merged else set()
    stacks += [stack for uid in files if uid not in names for stack in _group_into_stacks(uid, files[uid])]
    if series is not None:
        named = [stack for stack in stacks if series in {stack.name, stack.head.series}]
        if not named:
            raise UnknownSeries(
                "No MR or CT slices have the requested SeriesInstanceUID.",
                expected=_list_stacks(stacks),
                advice="Name one of these. If there is only one, no name is needed.",
            )
        stacks = named
    remaining, left_out = _apply_rules(stacks, sequences)
    if len(remaining) > 1:
        raise _several_stacks(remaining, [stack for _, others in left_out for stack in others])
    _refuse_blocks(remaining[0], [stack for _, others in left_out for stack in others])
    notes = [_describe_left_out(name, others) for name, others in left_out if others]
    return remaining[0], [*notes, *remaining[0].notes]


def _several_stacks(remaining: Sequence[Stack], left_out: Sequence[Stack]) -> SeveralSeries:
    if len({stack.head.series for stack in remaining}) > 1:
        found = f"There are {len(remaining)} MR or CT series."
    else:
        found = f"One series contains {len(remaining)} stacks of slices that differ in position, size or type."
    others = [stack for stack in left_out if not stack.is_short]
    more = f" Not considered, but also possible: {_list_stacks(others)}" if others else ""
    return SeveralSeries(
        found,
        expected="one series, or the name of the series to read.",
        advice=f"Name one with `--series` or `?series=`: {_list_stacks(remaining)}{more}",
    )


def _refuse_blocks(stack: Stack, left_out: Sequence[Stack]) -> None:
    """Raise an error if slices that would be left out may continue the stack.

    These are short stacks, and other stacks of the same series, that neither cross the stack nor lie inside it.

    Raises
    ------
    SeveralSeries
    """
    candidates = [other for other in left_out if other.is_short or other.head.series == stack.head.series]
    blocks = [other for other in candidates if not stack.covers(other)]
    if blocks:
        places = "; ".join(block.describe() for block in blocks[:MAX_LISTED])
        raise SeveralSeries(
            f"{len(blocks)} stacks of slices differ from the longest stack in size, orientation, spacing or series, "
            f"and show tissue outside it: {places}. Without them the scan may be truncated.",
            expected="one stack that covers the head, or the name of the stack to read.",
            advice=f"Name one with `--series` or `?series=`: {_list_stacks([stack, *blocks])}",
        )


def _apply_rules(stacks: list[Stack], sequences: Collection[str]) -> tuple[list[Stack], list[tuple[str, list[Stack]]]]:
    """Return the stacks that remain, and for each rule its name and the stacks that it left out."""
    remaining, left_out = stacks, []
    for name, is_excluded in EXCLUSION_RULES:
        excluded = [stack for stack in remaining if is_excluded(stack, remaining, sequences)]
        if len(excluded) < len(remaining):
            left_out.append((name, excluded))
            remaining = [stack for stack in remaining if stack not in excluded]
    return remaining, left_out


def _describe_left_out(name: str, stacks: Sequence[Stack]) -> str:
    places = [stack.describe() for stack in stacks[:MAX_LISTED]]
    places += [f"{len(stacks) - MAX_LISTED} more"] if len(stacks) > MAX_LISTED else []
    return f"Left out: {len(stacks)} {name} ({'; '.join(places)})."


def _list_stacks(stacks: Iterable[Stack]) -> str:
    ordered = sorted(stacks, key=lambda stack: -len(stack.frames))
    more = f" and {len(ordered) - MAX_LISTED} more" if len(ordered) > MAX_LISTED else ""
    return "; ".join(map(str, ordered[:MAX_LISTED])) + more + "."


def _merge_single_slices(files: dict[str, list[Header]]) -> Stack | None:
    """Return a stack of slices that each have a series of their own, or None if they form no regular stack.

    Some anonymisers give a new SeriesInstanceUID to each file.
    """
    singles = {uid: members[0] for uid, members in files.items() if len(members) == 1 and not members[0].is_volume}
    if len(singles) < MIN_SLICES:
        return None
    uid, first = next(iter(singles.items()))
    try:
        groups = _join_groups(_group_by_orientation(list(singles.values())))
        regular = len(groups) == 1 and not arrange_slices([plane for _, _, plane in groups[0].frames]).faults
    except CounterpartError:
        return None
    if not regular:
        return None
    note = (
        f"The {len(singles)} slices state {len(singles)} series (SeriesInstanceUID). They were read as one stack, "
        "because their positions continue each other."
    )
    return Stack(uid or first.series, groups[0].frames, (note, *groups[0].notes))


def _group_into_stacks(uid: str, headers: Sequence[Header]) -> list[Stack]:
    """Return the stacks of one series, the longest first."""
    joined = _join_groups(_group_by_orientation(headers))
    groups = [(frames, group.notes) for group in joined for frames in _group_by_key(list(group.frames))]
    groups.sort(key=lambda group: -len(group[0]))
    if len(groups) == 1:
        return [Stack(uid, tuple(groups[0][0]), groups[0][1])]
    return [Stack(f"{uid}/{i}", tuple(frames), notes) for i, (frames, notes) in enumerate(groups, 1)]


def _group_by_orientation(headers: Sequence[Header]) -> list[list[LocatedFrame]]:
    """Group frames by size, frame of reference, orientation and spacing.

    The frame of reference is ignored if most files have their own, because an anonymiser wrote it.
    """
    frames_of_reference = {header.frame_of_reference for header in headers}
    own = len(frames_of_reference) > max(2, len(headers) / 2) and not any(header.is_volume for header in headers)
    groups: list[list[LocatedFrame]] = []
    for header in headers:
        for index, plane in enumerate(header.planes):
            assert plane is not None, "frames without a position were left out before"
            group = next((group for group in groups if _belongs_to(header, plane, group[0], same_frame=not own)), None)
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


def _belongs_to(
    header: Header, plane: Plane, other: LocatedFrame, *, same_frame: bool, tolerance: float = DIRECTION_TOLERANCE
) -> bool:
    first, _, reference = other
    return bool(
        (header.modality, header.rows, header.columns, header.tiles)
        == (first.modality, first.rows, first.columns, first.tiles)
        and (not same_frame or header.frame_of_reference == first.frame_of_reference)
        and np.allclose(plane.orientation, reference.orientation, rtol=0, atol=tolerance)
        and np.allclose(plane.spacing, reference.spacing, rtol=DIRECTION_TOLERANCE, atol=0)
    )


def _join_groups(groups: Sequence[list[LocatedFrame]]) -> list[Stack]:
    """Join groups that form one stack together, the longest first. The stacks have no names."""
    rest = sorted(groups, key=lambda frames: -len(frames))
    joined = []
    while rest:
        main = rest.pop(0)
        near = [
            group
            for group in rest
            if _belongs_to(*_place(group), main[0], same_frame=False, tolerance=JITTER_TOLERANCE)
        ]
        for family in (near, *([group] for group in near)):
            if family and all(group in rest for group in family) and _form_one_stack(main, family):
                main = main + [frame for group in family for frame in group]
                rest = [group for group in rest if group not in family]
        joined.append(_with_one_orientation(main))
    return joined


def _place(frames: Sequence[LocatedFrame]) -> tuple[Header, Plane]:
    return frames[0][0], frames[0][2]


def _form_one_stack(main: Sequence[LocatedFrame], others: Sequence[Sequence[LocatedFrame]]) -> bool:
    """Return True if the groups have no position twice, and their union is as regular as the main group."""
    alone = [plane for _, _, plane in main]
    union = alone + [plane for group in others for _, _, plane in group]
    try:
        if not arrange_slices(union).faults:
            return True
        return bool(arrange_slices(alone).faults) and largest_gap(union) <= largest_gap(alone)
    except CounterpartError:  # several images at one position, or no valid position
        return False


def _with_one_orientation(frames: list[LocatedFrame]) -> Stack:
    """Return the stack with the orientation of its first frame in frames that were joined, and notes about them."""
    reference = frames[0][2].orientation
    notes, turned, result = [], [], []
    for header, index, plane in frames:
        difference = np.abs(np.subtract(plane.orientation, reference)).max()
        if difference > DIRECTION_TOLERANCE:
            turned.append(difference)
            plane = replace(plane, orientation=reference)  # noqa: PLW2901
        result.append((header, index, plane))
    if turned:
        notes.append(
            f"{len(turned)} of {len(frames)} slices differ from the others in orientation, by at most "
            f"{np.degrees(max(turned)):.2f} degrees. They were read with the orientation of the others."
        )
    count = len({header.frame_of_reference for header, _, _ in frames})
    if count > 1:
        notes.append(
            f"The slices state {count} frames of reference (FrameOfReferenceUID). They were read as one stack, because "
            "their positions continue each other."
        )
    return Stack("", tuple(result), tuple(notes))


def _group_by_key(frames: list[LocatedFrame]) -> list[list[LocatedFrame]]:
    """Group frames that share their positions by echo, b-value, component and contrast, else by ImageType.

    Frames at different positions stay in one group, because their echo times may differ by rounding.
    """
    if not _share_positions(frames):
        return [frames]
    groups: dict[AcquisitionKey, list[LocatedFrame]] = defaultdict(list)
    for frame in frames:
        groups[frame[2].key].append(frame)
    return [part for group in groups.values() for part in _group_by_image_type(group)]


def _group_by_image_type(frames: list[LocatedFrame]) -> list[list[LocatedFrame]]:
    """Group frames that share their positions by ImageType, if then none of them share a position."""
    if not _share_positions(frames):
        return [frames]
    groups: dict[tuple[str, ...], list[LocatedFrame]] = defaultdict(list)
    for frame in frames:
        groups[frame[0].image_type].append(frame)
    return [frames] if any(map(_share_positions, groups.values())) else list(groups.values())


def _share_positions(frames: Sequence[LocatedFrame]) -> bool:
    return bool(count_images_per_position([plane for _, _, plane in frames]).max() > 1)
