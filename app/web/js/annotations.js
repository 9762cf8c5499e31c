// Scale bars and finding numbers, drawn above the picture.

const BAR_LENGTHS_MM = [100, 50, 20, 10, 5];
const MAX_SHARE = 0.4; // of the width of a tile
const AXES = [[0, 1, 2], [0, 2, 1], [1, 2, 0]]; // across, up, through: axial, coronal, sagittal

/** Draw the annotations of every tile that shows a plane. */
export function annotate(canvas, nv, { findings, isOn }) {
  const { width, height } = nv.canvas;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  if (nv.volumes.length === 0) return;
  const scale = nv.uiData?.dpr ?? devicePixelRatio ?? 1;
  context.font = `600 ${Math.round(13 * scale)}px system-ui, sans-serif`;
  context.lineWidth = 3 * scale;
  context.lineJoin = "round";
  context.textBaseline = "middle";
  for (const tile of nv.screenSlices.filter(({ axCorSag, fovMM }) => axCorSag <= 2 && fovMM.length > 1)) {
    drawScaleBar(context, tile, scale);
    if (isOn) for (const finding of findings) drawNumber(context, tile, nv, finding, scale);
  }
}

function placeOf(tile) {
  let [left, top, width, height] = tile.leftTopWidthHeight;
  const isMirrored = width < 0;
  if (isMirrored) [left, width] = [left + width, -width];
  return { left, top, width, height, isMirrored };
}

function drawScaleBar(context, tile, scale) {
  const { left, top, width, height } = placeOf(tile);
  const pixelsPerMm = width / Math.abs(tile.fovMM[0]);
  const length = BAR_LENGTHS_MM.find((mm) => mm * pixelsPerMm <= width * MAX_SHARE);
  if (!length || height < 80 * scale) return;
  const [x, y] = [left + 10 * scale, top + height - 12 * scale];
  const end = x + length * pixelsPerMm;
  const tick = 5 * scale;
  const path = new Path2D(`M${x} ${y - tick}V${y + tick}M${x} ${y}H${end}M${end} ${y - tick}V${y + tick}`);
  context.textAlign = "left";
  strokeAndFill(context, scale, path, `${length / 10} cm`, end + 6 * scale, y);
}

function strokeAndFill(context, scale, path, text, x, y) {
  context.strokeStyle = "#000";
  context.lineWidth = 4 * scale;
  context.stroke(path);
  context.strokeText(text, x, y);
  context.strokeStyle = context.fillStyle = "#d7dde4";
  context.lineWidth = 1.5 * scale;
  context.stroke(path);
  context.fillText(text, x, y);
}

/** Write the number beside a finding whose box the plane cuts. A doubtful finding has a question mark. */
function drawNumber(context, tile, nv, finding, scale) {
  const [across, up, through] = AXES[tile.axCorSag];
  const [low, high] = finding.box_mm;
  const plane = planeOf(tile, nv, through);
  if (plane < low[through] || plane > high[through]) return;
  const { left, top, width, height, isMirrored } = placeOf(tile);
  const toX = (mm) => {
    const share = (mm - tile.leftTopMM[0]) / tile.fovMM[0];
    return left + (isMirrored ? 1 - share : share) * width;
  };
  const toY = (mm) => top + (1 - (mm - tile.leftTopMM[1]) / tile.fovMM[1]) * height;
  const x = Math.max(toX(low[across]), toX(high[across])) + 4 * scale;
  const y = Math.min(toY(low[up]), toY(high[up]));
  const text = `${finding.label}${finding.isDoubtful ? "?" : ""}`;
  context.textAlign = "left";
  context.strokeStyle = "#000";
  context.lineWidth = 4 * scale;
  context.strokeText(text, x, y);
  context.fillStyle = finding.isSelected ? "#78dcff" : finding.isDoubtful ? "#ffd60a" : "#ff8d80";
  context.fillText(text, x, y);
}

function planeOf(tile, nv, through) {
  const frac = [...nv.scene.crosshairPos];
  frac[through] = tile.sliceFrac;
  return nv.frac2mm(frac, 0, true)[through];
}
