"""A preview that a radiologist understands at a glance, drawn with Pillow.

Radiological convention, as on the letters drawn beside each picture: the patient's right is on
the viewer's left, anterior is up.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from app.manifest import Manifest
from app.pipeline.detect import Detection
from app.pipeline.findings import label_findings
from app.volume import BoolArray, FloatArray

ROWS = 5
ZOOM = 3
MARGIN = 26
GAP = 8
HEADER = 44
FOOTER = 26
COLUMNS = ("scan", "healthy counterpart", "anomaly map", "mask")
GREY = 170
MASK_COLOUR = (255, 64, 64)
# The map is drawn from black to white-hot at this multiple of the threshold.
MAP_RANGE = 3.0


def write_preview(path: Path, detection: Detection, manifest: Manifest, notice: str) -> None:
    """Draw the slices that differ most: scan, counterpart, anomaly map, mask.

    Parameters
    ----------
    path : Path
        Target .png.
    notice : str
        Printed below: "Research use only ...".
    """
    labels, _ = label_findings(detection.anomaly, manifest.residual, manifest.preprocessing.voxel_ml)
    found = labels > 0
    threshold = manifest.residual.threshold
    rows = [_row(detection, found, index, threshold) for index in _key_slices(detection, found)]
    height, width = (side * ZOOM for side in manifest.preprocessing.shape)
    canvas = Image.new(
        "RGB",
        (MARGIN + len(COLUMNS) * (width + GAP), HEADER + len(rows) * (height + GAP) + FOOTER),
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    for column, title in enumerate(COLUMNS):
        draw.text((MARGIN + column * (width + GAP) + width // 2, HEADER // 2), title, (GREY,) * 3, font, anchor="mm")
    for row, (z_mm, panels) in enumerate(rows):
        top = HEADER + row * (height + GAP)
        for column, panel in enumerate(panels):
            image = Image.fromarray(panel).resize((width, height), Image.Resampling.BICUBIC)
            left = MARGIN + column * (width + GAP)
            canvas.paste(image, (left, top))
            draw.text((left + 6, top + height // 2), "R", (GREY,) * 3, font, anchor="lm")
            draw.text((left + width // 2, top + 4), "A", (GREY,) * 3, font, anchor="mt")
        label = Image.new("RGB", (height, MARGIN))
        ImageDraw.Draw(label).text((height // 2, MARGIN // 2), f"z = {z_mm:.0f} mm", (GREY,) * 3, font, anchor="mm")
        canvas.paste(label.rotate(90, expand=True), (0, top))
    draw.text((canvas.width // 2, canvas.height - FOOTER // 2), notice, (GREY,) * 3, font, anchor="mm")
    temporary = path.with_name(path.name + ".part")
    canvas.save(temporary, format="PNG", optimize=False)
    temporary.replace(path)


def _key_slices(detection: Detection, found: BoolArray) -> list[int]:
    """The slices with most findings; where there are none, slices spread over the scan."""
    known = np.flatnonzero(detection.analysed)
    above = found.sum(axis=(1, 2))
    # Neighbours show the same lesion: one slice of every few.
    apart = max(1, len(known) // (3 * ROWS))
    chosen: list[int] = []
    for index in np.argsort(-above, kind="stable"):
        if above[index] and len(chosen) < ROWS and all(abs(index - c) >= apart for c in chosen):
            chosen.append(int(index))
    spread = known[np.linspace(0, len(known) - 1, ROWS + 2).round().astype(int)][1:-1]
    for index in spread:
        if len(chosen) < ROWS and int(index) not in chosen:
            chosen.append(int(index))
    return sorted(chosen, reverse=True)


def _row(
    detection: Detection, found: BoolArray, index: int, threshold: float
) -> tuple[float, list[npt.NDArray[np.uint8]]]:
    """Height in millimetres and the four pictures of one slice."""
    affine = detection.slices.grid.affine
    x = _upright(detection.slices.x[index, 0])
    counterpart = _upright(detection.counterpart[index])
    anomaly = _upright(detection.anomaly[index])
    mask = found[index, ::-1, ::-1]
    scan = _grey(x)
    overlay = scan.copy()
    overlay[mask] = (0.4 * overlay[mask] + 0.6 * np.array(MASK_COLOUR)).astype(np.uint8)
    return float(affine[2, 0] * index + affine[2, 3]), [
        scan,
        _grey(np.nan_to_num(counterpart)),
        _hot(np.nan_to_num(anomaly) / (MAP_RANGE * threshold)),
        overlay,
    ]


def _upright(image: FloatArray) -> FloatArray:
    """Rows run posterior to anterior and columns left to right: turn both for the viewer."""
    return image[::-1, ::-1]


def _grey(image: FloatArray) -> npt.NDArray[np.uint8]:
    levels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.asarray(np.repeat(levels[..., None], 3, axis=-1), dtype=np.uint8)


def _hot(image: FloatArray) -> npt.NDArray[np.uint8]:
    """Black, red, yellow, white."""
    level = np.clip(image, 0, 1)[..., None] * 3 - np.arange(3)
    return np.asarray(np.round(np.clip(level, 0, 1) * 255), dtype=np.uint8)
