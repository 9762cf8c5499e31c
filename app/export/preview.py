"""Preview image of the findings, drawn with Pillow.

It follows the radiological convention, as the letters in each panel show: the patient's right is on the viewer's left,
anterior is up.
"""

from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from app.manifest import Manifest
from app.pipeline.detect import Detection
from app.pipeline.findings import label_findings
from app.volume import BoolArray, FloatArray

RgbImage = npt.NDArray[np.uint8]  # (H, W, 3)
T = TypeVar("T", bound=np.generic)

ROWS = 5
ZOOM = 3
MARGIN = 26
GAP = 8
HEADER = 44
FOOTER = 26
COLUMNS = ("scan", "healthy counterpart", "anomaly map", "mask")
GREY = 170
MASK_COLOUR = (255, 64, 64)
# The anomaly map is white at this multiple of the threshold.
MAP_RANGE = 3.0


def write_preview(path: Path, detection: Detection, manifest: Manifest, notice: str) -> None:
    """Draw scan, counterpart, anomaly map and mask of the slices with the largest findings.

    Parameters
    ----------
    path : Path
        PNG file to write.
    detection : Detection
    manifest : Manifest
        Contains the thresholds.
    notice : str
        Text at the bottom of the image.
    """
    labels, _ = label_findings(detection.anomaly, manifest.residual, manifest.preprocessing.voxel_ml)
    mask = labels > 0
    threshold = manifest.residual.threshold
    rows = [_draw_panels(detection, mask, index, threshold) for index in _select_slices(detection, mask)]
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
    canvas.save(path, format="PNG", optimize=False)


def _select_slices(detection: Detection, mask: BoolArray) -> list[int]:
    """Return up to `ROWS` slice indices, highest first: the largest findings, then slices spread over the scan."""
    analysed = np.flatnonzero(detection.analysed)
    sizes = mask.sum(axis=(1, 2))  # (N,)
    # Adjacent slices show the same lesion, so the selected slices keep a distance.
    distance = max(1, len(analysed) // (3 * ROWS))
    selected: list[int] = []
    for index in np.argsort(-sizes, kind="stable"):
        if sizes[index] and len(selected) < ROWS and all(abs(index - other) >= distance for other in selected):
            selected.append(int(index))
    spread = analysed[np.linspace(0, len(analysed) - 1, ROWS + 2).round().astype(int)][1:-1]
    for index in spread:
        if len(selected) < ROWS and int(index) not in selected:
            selected.append(int(index))
    return sorted(selected, reverse=True)


def _draw_panels(detection: Detection, mask: BoolArray, index: int, threshold: float) -> tuple[float, list[RgbImage]]:
    """Return the height in millimetres and the four panels of one slice."""
    affine = detection.slices.grid.affine
    scan = _grey(_to_display(detection.slices.x[index, 0]))
    overlay = scan.copy()
    inside = _to_display(mask[index])
    overlay[inside] = (0.4 * overlay[inside] + 0.6 * np.array(MASK_COLOUR)).astype(np.uint8)
    return float(affine[2, 0] * index + affine[2, 3]), [
        scan,
        _grey(np.nan_to_num(_to_display(detection.counterpart[index]))),
        _heat_map(np.nan_to_num(_to_display(detection.anomaly[index])) / (MAP_RANGE * threshold)),
        overlay,
    ]


def _to_display(image: npt.NDArray[T]) -> npt.NDArray[T]:
    """Turn rows (posterior to anterior) and columns (left to right) into the radiological convention."""
    return image[::-1, ::-1]


def _grey(image: FloatArray) -> RgbImage:
    """Map 0 to black and 1 to white."""
    levels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.asarray(np.repeat(levels[..., None], 3, axis=-1), dtype=np.uint8)


def _heat_map(image: FloatArray) -> RgbImage:
    """Map 0 to 1 to black, red, yellow and white."""
    level = np.clip(image, 0, 1)[..., None] * 3 - np.arange(3)
    return np.asarray(np.round(np.clip(level, 0, 1) * 255), dtype=np.uint8)
