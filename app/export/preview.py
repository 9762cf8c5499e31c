"""Preview image of the findings, drawn with Pillow, and a small picture for lists.

It follows the radiological convention, as the letters in each panel show: the patient's right is on the viewer's left,
anterior is up. Each row is one axial plane. All values are sampled from the scan and from the results on its own grid,
so the outlines are those of the mask.
"""

from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import numpy as np
import numpy.typing as npt
from nibabel import affines
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from app.export.report import Report, by_certainty
from app.pipeline.detect import ScanResult, plane_height, plane_numbers
from app.pipeline.findings import LabelArray
from app.volume import Affine, FloatArray

RgbImage = npt.NDArray[np.uint8]  # (H, W, 3)
Points = npt.NDArray[np.float64]
Colour = tuple[int, int, int]

ROWS = 5
PANEL_WIDTH = 330
MARGIN, GAP, LINE = 30, 8, 19
LIST_WIDTH = 178
BAR_WIDTH, BAR_SPACE = 14, 98
COLUMNS = ("scan", "healthy counterpart", "anomaly map", "findings")
# Around the analysed region.
BORDER_MM = 12.0
SCALE_BAR_MM = 50
# The small picture of a result for lists: its pixels, and the border around the analysed region.
THUMBNAIL_SIZE = 160
THUMBNAIL_BORDER_MM = 6.0
# Planes closer than this show the same findings.
SAME_PLANE_MM = 4.0
WHITE, GREY, BLACK = (235, 235, 235), (165, 165, 165), (0, 0, 0)
MASK_COLOUR, WARNING_COLOUR = (255, 64, 64), (255, 190, 60)
# The anomaly map is white at this multiple of the threshold.
MAP_RANGE = 3.0
# The scan below the anomaly map is darkened to this fraction.
UNDERLAY = 0.4
TEXT, SMALL = 15, 13
# Letters of a warning in one line.
LINE_LENGTH = 180


@dataclass(frozen=True)
class Plane:
    """One axial plane of the picture.

    Attributes
    ----------
    z_mm : float
        RAS+ mm.
    scan, counterpart : (H, W) ndarray
        Intensities as the model saw them: 0 is drawn black, 1 white.
    anomaly : (H, W) ndarray
        NaN where nothing was analysed.
    labels : (H, W) ndarray
        Labels of the findings, as in labels.nii.gz.
    """

    z_mm: float
    scan: FloatArray
    counterpart: FloatArray
    anomaly: FloatArray
    labels: LabelArray


@dataclass(frozen=True)
class View:
    """Section of the planes that is drawn: the analysed region and a border.

    Attributes
    ----------
    right_mm, anterior_mm : float
        RAS+ position of the outermost pixels at the viewer's left and at the top.
    width, height : int
        Pixels.
    mm_per_pixel : float
    """

    right_mm: float
    anterior_mm: float
    width: int
    height: int
    mm_per_pixel: float

    def points(self, z_mm: float) -> Points:
        """Return the RAS+ position of each pixel of a plane, (H, W, 3)."""
        x = self.right_mm - np.arange(self.width) * self.mm_per_pixel
        y = self.anterior_mm - np.arange(self.height) * self.mm_per_pixel
        points = np.empty((self.height, self.width, 3))
        points[..., 0], points[..., 1], points[..., 2] = x, y[:, None], z_mm
        return points


def draw_preview(result: ScanResult, report: Report) -> Image.Image:
    """Draw scan, counterpart, anomaly map and outlined findings in the planes of the surest findings.

    Parameters
    ----------
    result : ScanResult
    report : Report
        Contains the thresholds, the model and the warnings.
    """
    view = _choose_view(result)
    change = np.nan_to_num(result.detection.counterpart - result.detection.slices.x[:, 0])
    planes = [sample_plane(result, change, view, z_mm) for z_mm in choose_planes(result)]
    header, footer = _header_lines(report), [report.notice]
    width = MARGIN + len(COLUMNS) * (view.width + GAP) + BAR_SPACE + LIST_WIDTH
    top = GAP + LINE * (len(header) + 1) + GAP
    height = top + len(planes) * (view.height + GAP) + LINE * len(footer) + GAP
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    for number, (text, colour) in enumerate(header):
        _write(draw, (MARGIN, GAP + number * LINE), text, colour, TEXT)
    lefts = [MARGIN + column * (view.width + GAP) + (BAR_SPACE if column > _MAP else 0) for column in range(4)]
    for left, title in zip(lefts, COLUMNS, strict=True):
        _write(draw, (left + view.width // 2, top - LINE // 2 - 3), title, GREY, TEXT, "mm")
    for row, plane in enumerate(planes):
        y = top + row * (view.height + GAP)
        _draw_row(canvas, draw, plane, view, (lefts, y), report)
    _write(draw, (lefts[-1] + view.width + GAP, top - LINE // 2 - 3), "volume, peak of the map", GREY, SMALL, "lm")
    _draw_colour_bar(canvas, draw, (lefts[_MAP] + view.width + 6, top, view.height), report)
    for number, text in enumerate(footer):
        _write(draw, (width // 2, height - (len(footer) - number) * LINE), text, GREY, TEXT, "mt")
    return canvas


_MAP = COLUMNS.index("anomaly map")


# ---- planes ------------------------------------------------------------------------------------


def choose_planes(result: ScanResult) -> list[float]:
    """Return the RAS+ heights of up to `ROWS` planes, highest first.

    The planes with the largest area of the surest findings come first, then planes spread over the analysed slices.
    """
    chosen: list[float] = []
    for lesion in sorted(result.lesions, key=lambda lesion: (-lesion.peak, lesion.label)):
        z_mm = lesion.key_z_mm
        if len(chosen) < ROWS and all(abs(z_mm - other) >= SAME_PLANE_MM for other in chosen):
            chosen.append(z_mm)
    affine = result.detection.slices.grid.affine
    analysed = np.flatnonzero(result.detection.analysed)
    spread = analysed[np.linspace(0, len(analysed) - 1, ROWS + 2).round().astype(int)][1:-1]
    for number in plane_numbers(affine[2, 0] * spread + affine[2, 3], result.affine):
        z_mm = plane_height(float(number), result.affine)
        if len(chosen) < ROWS and all(abs(z_mm - other) >= SAME_PLANE_MM for other in chosen):
            chosen.append(z_mm)
    return sorted(chosen, reverse=True)


def _choose_view(result: ScanResult) -> View:
    """Return the section around everything that was analysed, with the size of a panel."""
    slices = result.detection.slices
    rows, columns = np.nonzero(slices.foreground[result.detection.analysed].any(axis=0))
    affine = slices.grid.affine
    y, x = (np.array([low, high]) for low, high in ((rows.min(), rows.max()), (columns.min(), columns.max())))
    y, x = affine[1, 1] * y + affine[1, 3], affine[0, 2] * x + affine[0, 3]
    mm_per_pixel = float(x[1] - x[0] + 2 * BORDER_MM) / PANEL_WIDTH
    height = round(float(y[1] - y[0] + 2 * BORDER_MM) / mm_per_pixel)
    return View(float(x[1]) + BORDER_MM, float(y[1]) + BORDER_MM, PANEL_WIDTH, height, mm_per_pixel)


def sample_plane(result: ScanResult, change: FloatArray, view: View, z_mm: float) -> Plane:
    """Sample the scan and its results in one axial plane.

    Parameters
    ----------
    result : ScanResult
    change : (N, H, W) ndarray
        Counterpart minus slice, 0 where nothing was analysed.
    view : View
    z_mm : float
        RAS+ mm.
    """
    points = view.points(z_mm)
    grid = result.detection.slices.grid
    voxels = _indices(result.affine, points)
    scan = ndimage.map_coordinates(result.volume.array, voxels, order=1, cval=grid.background, output=np.float32)
    anomaly = ndimage.map_coordinates(result.anomaly, voxels, order=0, cval=np.nan, output=np.float32)
    labels = ndimage.map_coordinates(result.labels, voxels, order=0, cval=0)
    intensity = (scan - np.float32(grid.background)) / np.float32(grid.scale)
    changed = ndimage.map_coordinates(change, _indices(grid.affine, points), order=1, output=np.float32)
    counterpart = np.where(np.isfinite(anomaly), np.clip(intensity, 0, 1) + changed, intensity)
    return Plane(z_mm, intensity, counterpart, anomaly, labels)


def _indices(affine: Affine, points: Points) -> Points:
    """Return the indices of points in an array, with the axes first, as scipy takes them."""
    return np.moveaxis(affines.apply_affine(np.linalg.inv(affine), points), -1, 0)


# ---- drawing -----------------------------------------------------------------------------------


def _header_lines(report: Report) -> list[tuple[str, Colour]]:
    count = len(report.findings)
    found = f"{count} finding{'' if count == 1 else 's'}, {report.lesion_volume_ml:.2f} ml" if count else "No findings"
    lines = [(f"{found}. Model {report.model.id}, Counterpart {report.code_version}.", WHITE)]
    return lines + [(line, WARNING_COLOUR) for warning in report.warnings for line in wrap(warning, LINE_LENGTH)]


def _draw_row(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    plane: Plane,
    view: View,
    at: tuple[list[int], int],
    report: Report,
) -> None:
    lefts, top = at
    scan = _grey(plane.scan)
    level = np.nan_to_num(plane.anomaly) / (MAP_RANGE * report.threshold)
    outlined = scan.copy()
    outlined[outlines(plane.labels)] = MASK_COLOUR
    for left, panel in zip(lefts, (scan, _grey(plane.counterpart), _fuse(scan, level), outlined), strict=True):
        canvas.paste(Image.fromarray(panel), (left, top))
        _write(draw, (left + 5, top + view.height // 2), "R", GREY, SMALL, "lm")
        _write(draw, (left + view.width - 5, top + view.height // 2), "L", GREY, SMALL, "rm")
        _write(draw, (left + view.width // 2, top + 4), "A", GREY, SMALL, "mt")
    _draw_scale_bar(draw, (lefts[0] + 8, top + view.height - 10), view)
    label = Image.new("RGB", (view.height, MARGIN - 4))
    _write(ImageDraw.Draw(label), (view.height // 2, MARGIN // 2 - 2), f"z = {plane.z_mm:.0f} mm", GREY, TEXT, "mm")
    canvas.paste(label.rotate(90, expand=True), (0, top))
    _draw_numbers(draw, plane, (lefts[-1], top), view)
    _draw_list(draw, plane, (lefts[-1] + view.width + GAP, top), view.height // LINE, report)


def outlines(labels: LabelArray) -> npt.NDArray[np.bool_]:
    """Return the pixels just outside each finding, two wide, so that nothing inside is covered."""
    drawn = np.zeros(labels.shape, dtype=np.bool_)
    for label in np.unique(labels[labels > 0]):
        inside = labels == label
        drawn |= ndimage.binary_dilation(inside, np.ones((3, 3)), iterations=2) & ~inside
    drawn &= labels == 0
    return drawn


def _draw_numbers(draw: ImageDraw.ImageDraw, plane: Plane, at: tuple[int, int], view: View) -> None:
    """Write the number of each finding beside its outline."""
    left, top = at
    for label, box in enumerate(ndimage.find_objects(plane.labels.astype(np.int32)), start=1):
        if box is not None:
            x = min(box[1].stop + 4, view.width - 10 * len(str(label)))
            y = min(max(box[0].start - 4, 8), view.height - 8)
            _write(draw, (left + x, top + y), str(label), WHITE, TEXT, "lm")


def _draw_list(draw: ImageDraw.ImageDraw, plane: Plane, at: tuple[int, int], room: int, report: Report) -> None:
    """List the findings of a plane with their volume and peak, the surest first."""
    shown = set(np.unique(plane.labels)) - {0}
    findings = [finding for finding in by_certainty(report.findings) if finding.label in shown]
    lines = [f"{f.label}: {f.volume_ml:.2f} ml, peak {f.peak_score:.2f}" for f in findings]
    if len(lines) > room:
        lines = [*lines[: room - 1], f"and {len(lines) - room + 1} more"]
    for number, line in enumerate(lines):
        _write(draw, (at[0], at[1] + number * LINE), line, WHITE, SMALL)


def _draw_scale_bar(draw: ImageDraw.ImageDraw, at: tuple[int, int], view: View) -> None:
    x, y = at
    length = round(SCALE_BAR_MM / view.mm_per_pixel)
    draw.line([(x, y), (x + length, y)], WHITE, 2)
    for end in (x, x + length):
        draw.line([(end, y - 4), (end, y + 4)], WHITE, 2)
    _write(draw, (x + length // 2, y - 6), f"{SCALE_BAR_MM} mm", WHITE, SMALL, "mb")


def _draw_colour_bar(canvas: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int, int], report: Report) -> None:
    """Draw the scale of the anomaly map beside its first panel, with both thresholds."""
    left, top, height = at
    levels = np.linspace(1, 0, height, dtype=np.float32)[:, None].repeat(BAR_WIDTH, axis=1)
    canvas.paste(Image.fromarray(_heat(levels)), (left, top))
    draw.rectangle([left - 1, top - 1, left + BAR_WIDTH, top + height], outline=GREY)
    largest = MAP_RANGE * report.threshold
    for value, name in ((0.0, ""), (report.extent_threshold, "extent"), (report.threshold, "finding"), (largest, "")):
        y = top + round((1 - value / largest) * (height - 1))
        draw.line([(left + BAR_WIDTH, y), (left + BAR_WIDTH + 3, y)], GREY)
        edge = "t" if y == top else "b" if value == 0 else "m"
        _write(draw, (left + BAR_WIDTH + 5, y), f"{value:.2g} {name}", GREY, 11, f"l{edge}")


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: Colour, size: int, anchor: str = "lt"
) -> None:
    """Write text with a dark edge, so that it can be read on any picture."""
    font = ImageFont.load_default(size=size)
    draw.text(at, text, colour, font, anchor=anchor, stroke_width=2, stroke_fill=BLACK)


def _grey(image: FloatArray) -> RgbImage:
    """Map 0 to black and 1 to white."""
    levels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.asarray(np.repeat(levels[..., None], 3, axis=-1), dtype=np.uint8)


def _heat(level: FloatArray) -> RgbImage:
    """Map 0 to 1 to black, red, yellow and white."""
    parts = np.clip(level, 0, 1)[..., None] * 3 - np.arange(3)
    return np.asarray(np.round(np.clip(parts, 0, 1) * 255), dtype=np.uint8)


def _fuse(scan: RgbImage, level: FloatArray) -> RgbImage:
    """Lay the anomaly map over the darkened scan. A level of 0 is transparent."""
    opacity = np.clip(3 * level, 0, 1)[..., None]
    fused = UNDERLAY * scan * (1 - opacity) + _heat(level) * opacity
    return np.asarray(np.round(fused), dtype=np.uint8)


# ---- small picture for lists -------------------------------------------------------------------


def write_thumbnail(path: Path, result: ScanResult) -> None:
    """Draw the axial plane of the surest finding, or the middle one of a scan without findings.

    Parameters
    ----------
    path : Path
        PNG file to write.
    result : ScanResult
    """
    Image.fromarray(draw_thumbnail(result)).save(path, format="PNG", optimize=False)


def draw_thumbnail(result: ScanResult) -> RgbImage:
    """Return the picture, (`THUMBNAIL_SIZE`, `THUMBNAIL_SIZE`, 3)."""
    points = choose_square(result).points(choose_plane(result))
    voxels = np.moveaxis(affines.apply_affine(np.linalg.inv(result.affine), points), -1, 0)
    grid = result.detection.slices.grid
    scan = ndimage.map_coordinates(result.volume.array, voxels, order=1, cval=grid.background, output=np.float32)
    labels = ndimage.map_coordinates(result.labels, voxels, order=0, cval=0)
    grey = np.clip((scan - np.float32(grid.background)) / np.float32(grid.scale), 0, 1)
    picture = np.round(grey * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    picture[outlines(labels)] = MASK_COLOUR
    return np.asarray(picture, dtype=np.uint8)


def choose_plane(result: ScanResult) -> float:
    """Return the RAS+ height of the plane to draw, in mm."""
    if result.lesions:
        return max(result.lesions, key=lambda lesion: (lesion.peak, -lesion.label)).key_z_mm
    planes = choose_planes(result)
    return planes[len(planes) // 2]


def choose_square(result: ScanResult) -> View:
    """Return the square around everything that was analysed."""
    slices = result.detection.slices
    rows, columns = np.nonzero(slices.foreground[result.detection.analysed].any(axis=0))
    affine = slices.grid.affine
    y = affine[1, 1] * np.array([rows.min(), rows.max()]) + affine[1, 3]
    x = affine[0, 2] * np.array([columns.min(), columns.max()]) + affine[0, 3]
    side = float(max(np.ptp(x), np.ptp(y))) + 2 * THUMBNAIL_BORDER_MM
    return View(
        float(x.mean()) + side / 2, float(y.mean()) + side / 2, THUMBNAIL_SIZE, THUMBNAIL_SIZE, side / THUMBNAIL_SIZE
    )
