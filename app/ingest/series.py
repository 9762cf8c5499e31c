"""Many frames -> the one stack to read, by stated rules; or the list of those to choose from.

A series falls into stacks: frames of one size, orientation and spacing, and where several frames
share their places, of one echo, b-value and component. Among the stacks of everything that was
sent, each rule of `_RULES` leaves out what it names, as long as something else remains.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from app.errors import NotAVolume, SeveralSeries, UnknownSeries
from app.ingest.headers import Header
from app.ingest.plane import Kind, Plane
from app.ingest.stack import images_a_place, plane_name

Placed = tuple[Header, int, Plane]

# Beside a stack of at least this many slices, a shorter one is a scout, a key image or a leftover.
SHORTEST_STACK = 10
# Direction cosines of one stack agree within this; 0.06 degrees.
SAME_DIRECTION = 1e-3
# A list of series that a person can read.
MOST_LISTED = 10
# Scouts have three orientations, rotating projections some dozens: what has more is no stack at all.
MOST_ORIENTATIONS = 100


@dataclass(frozen=True)
class Stack:
    """Frames that may be one volume.

    Attributes
    ----------
    name : str
        What `?series=` takes: the SeriesInstanceUID, with "/2" for the second stack of several.
    frames : tuple of (Header, int, Plane)
        A file, the frame in it, and where that lies.
    """

    name: str
    frames: tuple[Placed, ...]

    @property
    def head(self) -> Header:
        return self.frames[0][0]

    @property
    def planes(self) -> list[Plane]:
        return [plane for _, _, plane in self.frames]

    @property
    def is_derived(self) -> bool:
        return all(header.is_derived for header, _, _ in self.frames)

    @property
    def is_repeated(self) -> bool:
        """Several images at each place: a time series."""
        return bool(images_a_place(self.planes).min() > 1)

    def __str__(self) -> str:
        kinds = {plane.kind for plane in self.planes}
        said = [f"{len(self.frames)} {self.head.modality} slices", plane_name(self.frames[0][2])]
        said += [str(kinds.pop())] if len(kinds) == 1 else []
        said += ["derived"] if self.is_derived else []
        return f"{self.name or 'without UID'} ({', '.join(filter(None, said))})"


# What a stack is that makes way for others.
_RULES: tuple[tuple[str, Callable[[Stack], bool]], ...] = (
    (f"stacks of fewer than {SHORTEST_STACK} slices", lambda stack: len(stack.frames) < SHORTEST_STACK),
    ("time series", lambda stack: stack.is_repeated),
    ("phase, real or imaginary stacks", lambda stack: all(plane.kind.component for plane in stack.planes)),
    ("derived stacks", lambda stack: stack.is_derived),
)


def choose(headers: Sequence[Header], series: str | None) -> tuple[Stack, list[str]]:
    """The stack to read.

    Parameters
    ----------
    headers : sequence of Header
        Grey MR and CT images, every frame with its place.
    series : str or None
        SeriesInstanceUID, or one with "/2" for its second stack, as `SeveralSeries` lists them.

    Returns
    -------
    stack : Stack
    notes : list of str
        What was left out.

    Raises
    ------
    SeveralSeries
        More than one is left by the rules.
    UnknownSeries
        `series` names none.
    NotAVolume
        Frames of very many orientations.
    """
    files: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        files[header.series].append(header)
    stacks = [stack for uid, of in files.items() for stack in _stacks(uid, of)]
    if series is not None:
        named = [stack for stack in stacks if series in {stack.name, stack.head.series}]
        if not named:
            raise UnknownSeries(
                "No MR or CT slices have the SeriesInstanceUID that was asked for.",
                expected=_listed(stacks),
                advice="Name one of these, or none where there is only one.",
            )
        stacks = named
    rest, notes = _sift(stacks)
    if len(rest) > 1:
        several = len({stack.head.series for stack in rest}) > 1
        what = "series" if several else "stacks of slices in one series, that differ in place, size or kind"
        raise SeveralSeries(
            f"There are {len(rest)} {'MR or CT ' if several else ''}{what}.",
            expected="one, or the name of the one to take.",
            advice=f"Name it (`--series`, `?series=`): {_listed(rest)}",
        )
    return rest[0], notes


def _sift(stacks: list[Stack]) -> tuple[list[Stack], list[str]]:
    rest, left_out = stacks, Counter[str]()
    for what, makes_way in _RULES:
        kept = [stack for stack in rest if not makes_way(stack)]
        if kept:
            left_out[what] = len(rest) - len(kept)
            rest = kept
    return rest, [f"Left out: {count} {what}." for what, count in left_out.items() if count]


def _listed(stacks: Iterable[Stack]) -> str:
    ordered = sorted(stacks, key=lambda stack: -len(stack.frames))
    more = f" and {len(ordered) - MOST_LISTED} more" if len(ordered) > MOST_LISTED else ""
    return "; ".join(map(str, ordered[:MOST_LISTED])) + more + "."


def _stacks(uid: str, headers: Sequence[Header]) -> list[Stack]:
    """The stacks of one series, the longest first."""
    found = [stack for of in _by_place(headers) for stack in _by_kind(of)]
    found.sort(key=lambda frames: -len(frames))
    if len(found) == 1:
        return [Stack(uid, tuple(found[0]))]
    return [Stack(f"{uid}/{i}", tuple(frames)) for i, frames in enumerate(found, 1)]


def _by_place(headers: Sequence[Header]) -> list[list[Placed]]:
    """Frames of one size and orientation."""
    stacks: list[list[Placed]] = []
    for header in headers:
        for index, plane in enumerate(header.planes):
            assert plane is not None, "only placed frames are let through"
            home = next((stack for stack in stacks if _belongs(header, plane, stack[0])), None)
            if home is not None:
                home.append((header, index, plane))
            elif len(stacks) < MOST_ORIENTATIONS:
                stacks.append([(header, index, plane)])
            else:
                raise NotAVolume(
                    f"The images of one series have more than {MOST_ORIENTATIONS} orientations or sizes.",
                    expected="slices of one orientation and size.",
                    advice="Send the acquired series, not projections or screenshots of it.",
                )
    return stacks


def _belongs(header: Header, plane: Plane, other: Placed) -> bool:
    first, _, reference = other
    return (
        (header.rows, header.columns, header.tiles) == (first.rows, first.columns, first.tiles)
        and header.frame_of_reference == first.frame_of_reference
        and np.allclose(plane.orientation, reference.orientation, rtol=0, atol=SAME_DIRECTION)
        and np.allclose(plane.spacing, reference.spacing, rtol=SAME_DIRECTION, atol=0)
    )


def _by_kind(frames: list[Placed]) -> list[list[Placed]]:
    """Split by echo, b-value and component, but only what shares its places: echo times may jitter."""
    if images_a_place([plane for _, _, plane in frames]).max() == 1:
        return [frames]
    kinds: dict[Kind, list[Placed]] = defaultdict(list)
    for frame in frames:
        kinds[frame[2].kind].append(frame)
    return list(kinds.values())
