"""Position of single frames, and the order and affine of a stack of them (PS3.3 C.7.6.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom.spatial import convert_affine_to_convention, create_affine_matrix_from_attributes
from nibabel import aff2axcodes

from app.errors import InvalidGeometry, IrregularSlices, NotAVolume
from app.volume import Affine

IntArray = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

# Scanners write positions to a tenth or a hundredth of a millimetre. A slice that is farther than half a tenth
# from its regular position is misplaced, or its neighbour is missing.
MAX_SPACING_ERROR_MM = 0.05
# Direction cosines with four decimals let the last slice of a stack drift sideways by some hundredths.
MAX_SIDEWAYS_SHIFT_MM = 0.2
# Row and column directions of an image are unit vectors at a right angle, up to rounding.
COSINE_TOLERANCE = 1e-3
# Slices thinner than this fraction of their spacing do not cover the tissue between them.
MIN_THICKNESS_FRACTION = 0.67

# Slices whose normals are nearer than 45 degrees are parallel rather than across.
MIN_PARALLEL = 0.7
# Points along each side of a slice that are searched inside a stack.
SAMPLES = 9
# A slice that is farther from every slice of a stack than this fraction of their distance fills a gap.
MAX_GAP_FRACTION = 0.6

# Anatomical planes by the LPS axis nearest to their normal.
_PLANES = ("sagittal", "coronal", "axial")
# Description of the end at which slices are counted from, by the direction (RAS code) of the slice axis.
_COUNTED_FROM = {
    "S": "from the feet up",
    "I": "from the head down",
    "L": "from right to left",
    "R": "from left to right",
    "A": "from back to front",
    "P": "from front to back",
}
_ADVICE = (
    "Send the complete series as it was acquired. If the gantry was tilted, reconstruct the series without tilt. Or "
    "choose to resample the slices: `--geometry resample`, `?geometry=resample`."
)


@dataclass(frozen=True)
class AcquisitionKey:
    """Attributes that differ between images of one position that were acquired together.

    Attributes
    ----------
    component : str
        "phase", "real" or "imaginary"; empty for magnitude, and if nothing is stated.
    echo_ms : float or None
        Echo time in milliseconds.
    b_value : float or None
        Diffusion weighting in s/mm2.
    contrast : str
        "water", "fat", "in phase" or "out of phase" of a Dixon acquisition; empty if nothing is stated.
    """

    component: str = ""
    echo_ms: float | None = None
    b_value: float | None = None
    contrast: str = ""

    def __str__(self) -> str:
        parts = [part for part in (self.component, self.contrast) if part]
        parts += [f"echo {self.echo_ms:g} ms"] if self.echo_ms is not None else []
        parts += [f"b = {self.b_value:g}"] if self.b_value is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Plane:
    """Position of one frame in space, in LPS millimetres (PS3.3 C.7.6.2).

    Attributes
    ----------
    position : tuple of float
        Centre of the first pixel, (3,).
    orientation : tuple of float
        Direction of increasing column index, then of increasing row index, (6,).
    spacing : tuple of float
        Millimetres between rows, then between columns.
    thickness : float or None
        Slice thickness in mm, if it is stated.
    key : AcquisitionKey
        Attributes that distinguish the frame from others at its position.
    acquisition : int or None
        AcquisitionNumber, if it is stated.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float | None
    key: AcquisitionKey = AcquisitionKey()
    acquisition: int | None = None


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Order and geometry of a stack of frames.

    Attributes
    ----------
    order : (N,) ndarray of int
        Indices of the frames, in their order along the normal of the stack.
    affine : (4, 4) ndarray
        Indices (column, row, slice) to RAS+ mm, valid if the stack is regular.
    notes : tuple of str
        Sentences about the spacing, for the report.
    faults : tuple of str
        Sentences that state why the stack is not regular; empty if it is regular.
    """

    order: IntArray
    affine: Affine
    notes: tuple[str, ...]
    faults: tuple[str, ...]

    def check_regular(self, hint: str = "") -> None:
        """Raise an error if the stack has faults.

        Parameters
        ----------
        hint : str
            Sentence to append to the faults.

        Raises
        ------
        IrregularSlices
        """
        if self.faults:
            raise IrregularSlices(
                " ".join([*self.faults, *filter(None, [hint])]),
                expected="slices at equal distances, exactly above one another.",
                advice=_ADVICE,
            )


def arrange_slices(planes: Sequence[Plane]) -> Arrangement:
    """Sort the frames of a stack along its normal, and derive its affine.

    Parameters
    ----------
    planes : sequence of Plane
        Frames of one orientation, in any order.

    Raises
    ------
    NotAVolume, IrregularSlices
        If there are several frames at each position, or at some positions.
    InvalidGeometry
        If directions, positions or spacings are invalid.
    """
    first = planes[0]
    _check_plane(first)
    positions = np.array([plane.position for plane in planes])  # (N, 3)
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    distances = positions @ normal
    order = np.argsort(distances, kind="stable")
    positions, distances = positions[order], distances[order]
    if not np.isfinite(positions).all():
        raise _invalid_geometry("An image position is not a finite number.")

    spacing, notes = _measure_spacing(distances, first)
    affine = affine_from_plane(planes[int(order[0])], spacing)
    faults: list[str] = []
    if len(planes) > 1:
        _check_repeats(distances)
        faults = [*_find_tilt(positions, normal), *_find_uneven_spacing(distances, affine)]
    return Arrangement(order, affine, notes, tuple(faults))


def affine_from_plane(plane: Plane, spacing: float) -> Affine:
    """Return the affine of a regular stack from its first plane: indices (column, row, slice) to RAS+ mm."""
    lps = create_affine_matrix_from_attributes(
        image_position=plane.position,
        image_orientation=plane.orientation,
        pixel_spacing=plane.spacing,
        spacing_between_slices=spacing,
    )
    return np.asarray(convert_affine_to_convention(lps, "LPS", "RAS"), dtype=np.float64)


def count_images_per_position(planes: Sequence[Plane]) -> IntArray:
    """Return the number of frames at each position along the normal of frames of one orientation."""
    return _count_per_position(_distances(planes))


def anatomical_plane(plane: Plane) -> str:
    """Return "axial", "coronal" or "sagittal", whichever is nearest to the frame; empty if it is invalid."""
    normal = np.abs(np.cross(plane.orientation[:3], plane.orientation[3:]))
    return _PLANES[int(normal.argmax())] if np.isfinite(normal).all() else ""


def largest_gap(planes: Sequence[Plane]) -> float:
    """Return the largest distance of neighbouring slices of one orientation in mm, or 0 for a single slice."""
    distances = _distances(planes)
    return float(np.diff(distances).max()) if len(distances) > 1 else 0.0


def describe_place(planes: Sequence[Plane], rows: int, columns: int) -> str:
    """Return the plane and the extent of slices, for example "axial, z -20 to 35 mm" (RAS+ mm of the centres)."""
    name = anatomical_plane(planes[0])
    centres = np.array([_centre(plane, rows, columns) for plane in planes])
    if not name or not np.isfinite(centres).all():
        return "at an invalid position"
    axis = _PLANES.index(name)
    values = centres[:, axis] * (-1, -1, 1)[axis]  # LPS to RAS
    low, high = (round(float(v)) for v in (values.min(), values.max()))
    return f"{name}, {'xyz'[axis]} {low} mm" if low == high else f"{name}, {'xyz'[axis]} {low} to {high} mm"


def crosses_or_lies_inside(
    planes: Sequence[Plane],
    size: tuple[int, int],
    stack: Sequence[Plane],
    stack_size: tuple[int, int],
    *,
    may_fill_gaps: bool = True,
) -> bool:
    """Return True if slices cross a stack like a scout, or lie inside it like key images.

    Slices that are nearly parallel to the stack lie inside it if all their centres do. Other slices cross it if a part
    of any of them is inside it.

    Parameters
    ----------
    planes, stack : sequence of Plane
        Slices of one orientation, and the stack of one orientation with which they are compared.
    size, stack_size : tuple of int
        Rows and columns of each.
    may_fill_gaps : bool
        False: parallel slices in a gap of the stack do not lie inside it.
    """
    first = stack[0]
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    axes = np.stack([first.orientation[:3], first.orientation[3:], normal])  # (3, 3)
    corners = np.concatenate([_sample(plane, *stack_size, 2) for plane in stack]) @ axes.T
    distances = _distances(stack)
    usual = float(np.median(np.diff(distances))) if len(distances) > 1 else 0.0
    margin = np.array([0, 0, max(usual, first.thickness or 0.0) / 2])
    low, high = corners.min(axis=0) - margin, corners.max(axis=0) + margin
    own_normal = np.cross(planes[0].orientation[:3], planes[0].orientation[3:])
    is_parallel = abs(float(normal @ own_normal)) > MIN_PARALLEL
    points = np.stack([_sample(plane, *size, 1 if is_parallel else SAMPLES) for plane in planes]) @ axes.T  # (N, P, 3)
    inside = ((points >= low) & (points <= high)).all(axis=-1)
    if not is_parallel:
        return bool(inside.any())
    if not may_fill_gaps:
        nearest = np.abs(points[:, 0, 2][:, None] - distances[None]).min(axis=1)
        inside &= (nearest < MAX_GAP_FRACTION * usual + MAX_SPACING_ERROR_MM)[:, None]
    return bool(inside.all())


def _distances(planes: Sequence[Plane]) -> Float64Array:
    """Return the sorted positions of slices of one orientation along their normal in mm."""
    orientation = planes[0].orientation
    normal = np.cross(orientation[:3], orientation[3:])
    return np.sort(np.array([plane.position for plane in planes]) @ normal)


def _sample(plane: Plane, rows: int, columns: int, count: int) -> Float64Array:
    """Return count x count points on a slice in LPS mm, (count * count, 3): its centre, or points up to its edges."""
    fractions = np.array([0.5]) if count == 1 else np.linspace(0, 1, count)
    across = np.outer(fractions * (columns - 1) * plane.spacing[1], plane.orientation[:3])
    down = np.outer(fractions * (rows - 1) * plane.spacing[0], plane.orientation[3:])
    points: Float64Array = np.array(plane.position) + (across[:, None] + down[None]).reshape(-1, 3)
    return points


def _centre(plane: Plane, rows: int, columns: int) -> Float64Array:
    centre: Float64Array = _sample(plane, rows, columns, 1)[0]
    return centre


def _check_plane(plane: Plane) -> None:
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    errors = (np.linalg.norm(row) - 1, np.linalg.norm(column) - 1, row @ column)
    if not np.abs(errors).max() <= COSINE_TOLERANCE:  # also True for NaN
        raise _invalid_geometry("The image orientation is not two unit vectors at a right angle.")
    if not min(plane.spacing) > 0 or not np.isfinite(plane.spacing).all():
        raise _invalid_geometry("The pixel spacing is not two positive numbers.")


def _invalid_geometry(found: str) -> InvalidGeometry:
    return InvalidGeometry(
        found,
        expected="ImagePositionPatient, ImageOrientationPatient and PixelSpacing as in DICOM PS3.3 C.7.6.2.",
        advice="Export the series again from the original.",
    )


def _measure_spacing(distances: Float64Array, plane: Plane) -> tuple[float, tuple[str, ...]]:
    """Return the mean distance between slices in mm, and notes about it."""
    if len(distances) == 1:
        if plane.thickness:
            return plane.thickness, ("There is only one slice. Its thickness is used as the slice spacing.",)
        return 1.0, ("There is only one slice, and it states no thickness. A slice spacing of 1 mm is assumed.",)
    spacing = float(distances[-1] - distances[0]) / (len(distances) - 1) or 1.0
    if plane.thickness and plane.thickness < MIN_THICKNESS_FRACTION * spacing:
        gap = "The tissue between the slices was not imaged."
        return spacing, (f"The slices are {plane.thickness:.2f} mm thick and {spacing:.2f} mm apart. {gap}",)
    return spacing, ()


def _count_per_position(distances: Float64Array) -> IntArray:
    """Return the number of frames at each position, from sorted distances."""
    group = np.concatenate([[0], np.cumsum(np.diff(distances) > MAX_SPACING_ERROR_MM)]).astype(np.int64)
    return np.asarray(np.bincount(group))


def _check_repeats(distances: Float64Array) -> None:
    """Raise an error if several frames have the same position."""
    counts = _count_per_position(distances)
    if counts.max() == 1:
        return
    if counts.min() == counts.max():
        where = f"each of {len(counts)} positions" if len(counts) > 1 else "one position"
        raise NotAVolume(
            f"There are {counts[0]} images at {where}. The series is a time series, or it contains several echoes, "
            "weightings or phases.",
            expected="one image at each position.",
            advice="Send only the images of one time, echo and type.",
        )
    at = int(np.argmax(counts > 1))
    raise IrregularSlices(
        f"There is more than one image at {int((counts > 1).sum())} of {len(counts)} positions. The first is position "
        f"{at + 1}, with {counts[at]} images.",
        expected="one image at each position.",
        advice="Send one acquisition without repeated images.",
    )


def _find_tilt(positions: Float64Array, normal: Float64Array) -> list[str]:
    """Return a sentence if slices are shifted sideways against the first one, as with a tilted gantry."""
    offsets = positions - positions[0]
    along = offsets @ normal
    shift = np.linalg.norm(offsets - along[:, None] * normal, axis=1)
    if shift.max() <= MAX_SIDEWAYS_SHIFT_MM:
        return []
    angle = float(np.degrees(np.arctan2(shift[-1], along[-1])))
    found = f"The stack is tilted by {angle:.1f} degrees against the normal of the slices (gantry tilt)."
    return [f"{found} The largest sideways shift of a slice is {shift.max():.1f} mm."]


def _find_uneven_spacing(distances: Float64Array, affine: Affine) -> list[str]:
    """Return a sentence if distances between neighbouring slices differ; it names missing slices."""
    n = len(distances)
    regular = np.linspace(distances[0], distances[-1], n)
    if np.abs(distances - regular).max() <= MAX_SPACING_ERROR_MM:
        return []
    gaps = np.diff(distances)
    usual = float(np.median(gaps))
    steps = np.round(gaps / usual).astype(int)
    counted = f"(counted {_COUNTED_FROM[str(aff2axcodes(affine)[2])]})"
    if steps.min() >= 1 and np.abs(gaps - steps * usual).max() <= 2 * MAX_SPACING_ERROR_MM:
        return [_describe_missing(gaps, steps, counted)]
    at = int(np.abs(gaps - usual).argmax())
    found = f"The slice spacing varies from {gaps.min():.1f} to {gaps.max():.1f} mm. The median is {usual:.1f} mm."
    return [f"{found} It is {gaps[at]:.1f} mm between slices {at + 1} and {at + 2} of {n} {counted}."]


def _describe_missing(gaps: Float64Array, steps: IntArray, counted: str) -> str:
    """Return a sentence that names the missing slices by their number in the complete series."""
    numbers = np.concatenate([[1], 1 + np.cumsum(steps)])  # of the slices that are present
    total, at = int(numbers[-1]), int(np.argmax(steps > 1))
    before, after = int(numbers[at]), int(numbers[at + 1])
    if after - before == 2:
        missing = f"Slice {before + 1} of {total} is missing"
    else:
        missing = f"Slices {before + 1} to {after - 1} of {total} are missing"
    found = f"{missing}: the distance between slices {before} and {after} is {gaps[at]:.1f} mm {counted}."
    others = int((steps > 1).sum()) - 1
    if others == 0:
        return found
    return f"{found} There {'are' if others > 1 else 'is'} {others} more gap{'s' if others > 1 else ''}."
