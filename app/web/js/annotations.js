// Outlines, finding numbers and scale bars, drawn above the picture.

import { traceOutlines } from "./contours.js";

const BAR_LENGTHS_MM = [100, 50, 20, 10, 5];
const MAX_BAR = 0.4; // of the width of a tile
const AXES = [[0, 1, 2], [0, 2, 1], [1, 2, 0]]; // across, up, through: axial, coronal, sagittal
const SMALL_TEXT = 14; // pixels, the smallest size of the style sheet
const COLOURS = { clear: "#ff5c50", doubtful: "#ffd60a", selected: "#78dcff" };

/** Draw the annotations of every tile that shows a plane. */
export function annotate(canvas, nv, { findings, outline, cache }) {
  const { width, height } = nv.canvas;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  if (nv.volumes.length === 0) return;
  const scale = (nv.uiData?.dpr ?? 1) * textScale();
  context.font = `600 ${Math.round(15 * scale)}px system-ui, sans-serif`;
  context.lineJoin = "round";
  context.textBaseline = "middle";
  context.textAlign = "left";
  for (const shown of nv.screenSlices.filter(({ axCorSag, fovMM }) => axCorSag <= 2 && fovMM.length > 1)) {
    const tile = new Tile(nv, shown);
    context.save();
    context.beginPath();
    context.rect(tile.left, tile.top, tile.width, tile.height);
    context.clip();
    if (outline > 0) drawFindings(context, tile, { nv, findings, outline, cache, scale });
    context.restore();
    drawScaleBar(context, tile, scale);
  }
}

/** Return the size of the page's text relative to that of a small screen. */
function textScale() {
  return parseFloat(getComputedStyle(document.documentElement).fontSize) / SMALL_TEXT;
}

/** The geometry of one shown plane. Fractions are those of the scan's grid along RAS+ axes. */
class Tile {
  constructor(nv, { axCorSag, leftTopWidthHeight, leftTopMM, fovMM, sliceFrac }) {
    [this.left, this.top, this.width, this.height] = leftTopWidthHeight;
    this._isMirrored = this.width < 0;
    if (this._isMirrored) [this.left, this.width] = [this.left + this.width, -this.width];
    [this.across, this.up, this.through] = AXES[axCorSag];
    this.fraction = sliceFrac;
    this.pixelsPerMm = this.width / Math.abs(fovMM[0]);
    const [low, high] = [nv.frac2mm([0, 0, 0]), nv.frac2mm([1, 1, 1])];
    const span = (axis, index) => [(low[axis] - leftTopMM[index]) / fovMM[index], (high[axis] - low[axis]) / fovMM[index]];
    this._x = span(this.across, 0);
    this._y = span(this.up, 1);
  }

  x(fraction) {
    const share = this._x[0] + fraction * this._x[1];
    return this.left + (this._isMirrored ? 1 - share : share) * this.width;
  }

  y(fraction) {
    return this.top + (1 - (this._y[0] + fraction * this._y[1])) * this.height;
  }
}

function drawFindings(context, tile, { nv, findings, outline, cache, scale }) {
  if (!nv.drawBitmap) return;
  const shape = nv.volumes[0].dimsRAS.slice(1, 4);
  const byLabel = new Map(findings.map((finding) => [finding.label, finding]));
  context.globalAlpha = outline;
  for (const { label, loops } of outlinesOf(tile, nv.drawBitmap, shape, cache)) {
    const finding = byLabel.get(label);
    const path = new Path2D();
    const points = loops.map((loop) => loop.map(([a, b]) => [tile.x(a / shape[tile.across]), tile.y(b / shape[tile.up])]));
    for (const loop of points) {
      path.moveTo(...loop[0]);
      for (const point of loop.slice(1)) path.lineTo(...point);
      path.closePath();
    }
    strokeOutline(context, path, finding, scale);
    if (finding) drawNumber(context, finding, points.flat(), scale);
  }
  context.globalAlpha = 1;
}

const colourOf = (finding) => COLOURS[finding?.isSelected ? "selected" : finding?.isDoubtful ? "doubtful" : "clear"];

/** Stroke an outline: dashed if doubtful, wider if selected. */
function strokeOutline(context, path, finding, scale) {
  const width = (finding?.isSelected ? 2.2 : 1.5) * scale;
  context.setLineDash([]);
  context.strokeStyle = "rgb(0 0 0 / 60%)";
  context.lineWidth = width + 1.5 * scale;
  context.stroke(path);
  context.setLineDash(finding?.isDoubtful ? [5 * scale, 4 * scale] : []);
  context.strokeStyle = colourOf(finding);
  context.lineWidth = width;
  context.stroke(path);
  context.setLineDash([]);
}

/** Write the number at the upper right of a finding. A doubtful finding has a question mark. */
function drawNumber(context, finding, points, scale) {
  const x = Math.max(...points.map(([across]) => across)) + 3 * scale;
  const y = Math.min(...points.map(([, down]) => down));
  writeText(context, `${finding.label}${finding.isDoubtful ? "?" : ""}`, [x, y], colourOf(finding), scale);
}

function writeText(context, text, [x, y], colour, scale) {
  context.strokeStyle = "#000";
  context.lineWidth = 4 * scale;
  context.strokeText(text, x, y);
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

function outlinesOf(tile, bitmap, shape, cache) {
  const index = Math.min(shape[tile.through] - 1, Math.max(0, Math.floor(tile.fraction * shape[tile.through])));
  const name = `${tile.through}:${index}`;
  if (!cache.has(name)) {
    const strides = [1, shape[0], shape[0] * shape[1]];
    const [across, up] = [strides[tile.across], strides[tile.up]];
    const offset = index * strides[tile.through];
    const at = (a, b) => bitmap[offset + a * across + b * up];
    cache.set(name, traceOutlines(at, shape[tile.across], shape[tile.up]));
  }
  return cache.get(name);
}

function drawScaleBar(context, tile, scale) {
  const length = BAR_LENGTHS_MM.find((mm) => mm * tile.pixelsPerMm <= tile.width * MAX_BAR);
  if (!length || tile.height < 80 * scale) return;
  const [x, y] = [tile.left + 8 * scale, tile.top + tile.height - 8 * scale];
  const end = x + length * tile.pixelsPerMm;
  const tick = 5 * scale;
  const path = new Path2D(`M${x} ${y - tick}V${y + tick}M${x} ${y}H${end}M${end} ${y - tick}V${y + tick}`);
  for (const [colour, width] of [["#000", 4], ["#dbe1e8", 1.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * scale;
    context.stroke(path);
  }
  writeText(context, `${length / 10} cm`, [x, y - 14 * scale], "#dbe1e8", scale);
}
