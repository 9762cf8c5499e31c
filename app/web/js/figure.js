// The figure of the printed report: axial key slices in radiological layout, one row a plane.

import { traceOutlines } from "./contours.js";

const MM = 6; // pixels of the figure per millimetre on paper
const WIDTH_MM = 190;
const PANEL_MM = 43;
const LEFT_MM = 4;
const GAP_MM = 1.5;
const BAR_MM = 9; // colour bar and its numbers
const HEAD_MM = 5;
const MARGIN_MM = 4; // around the head
const HEADINGS = ["scan", "healthy counterpart", "anomaly map", "findings"];
// The colour map "hot" of the viewer: [share, red, green, blue].
const HOT = [[0, 3, 0, 0], [0.37, 255, 0, 0], [0.75, 255, 255, 0], [1, 255, 255, 255]];

/**
 * Draw the figure.
 *
 * `volumes`: scan, counterpart, anomaly, labels. `planes`: [{z, findings}]. `scaleMax`: end of the colour scale.
 * `ticks`: values to mark on the colour bar.
 */
export function drawFigure(canvas, volumes, planes, { window, scaleMax, ticks }) {
  const grid = gridOf(volumes.scan);
  const rowMm = (PANEL_MM * grid.rows) / grid.columns;
  canvas.width = WIDTH_MM * MM;
  canvas.height = Math.ceil((HEAD_MM + planes.length * (rowMm + GAP_MM)) * MM);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.font = `${2.9 * MM}px system-ui, "Liberation Sans", sans-serif`;
  const x = (column) => (LEFT_MM + column * (PANEL_MM + GAP_MM) + (column > 2 ? BAR_MM : 0)) * MM;
  HEADINGS.forEach((text, column) => writeOn(context, text, x(column), (HEAD_MM - 1.5) * MM));
  planes.forEach((plane, row) => {
    const y = (HEAD_MM + row * (rowMm + GAP_MM)) * MM;
    drawRow(context, { volumes, plane, grid, x, y, height: rowMm * MM, window, scaleMax });
  });
  drawColourBar(context, x(2) + (PANEL_MM + 1) * MM, HEAD_MM * MM, Math.min(rowMm, 40) * MM, scaleMax, ticks);
}

/** Return the sampling grid of axial planes: 1 mm, in the box of the scan, cut to its content. */
function gridOf(scan) {
  const [low, high] = scan.content;
  const size = Math.max(high[0] - low[0], high[1] - low[1]) + 2 * MARGIN_MM;
  const spacing = Math.max(0.5, size / 256);
  const columns = Math.round((high[0] - low[0] + 2 * MARGIN_MM) / spacing);
  const rows = Math.round((high[1] - low[1] + 2 * MARGIN_MM) / spacing);
  return { left: high[0] + MARGIN_MM, top: high[1] + MARGIN_MM, spacing, columns, rows };
}

function drawRow(context, { volumes, plane, grid, x, y, height, window, scaleMax }) {
  const width = PANEL_MM * MM;
  const sample = (volume) => volume.plane(plane.z, grid);
  const scan = sample(volumes.scan);
  const grey = (values, dim = 1) => toPicture(grid, (index) => {
    const value = 255 * dim * clamp((values[index] - window[0]) / (window[1] - window[0]));
    return [value, value, value];
  });
  const anomaly = sample(volumes.anomaly);
  const map = toPicture(grid, (index) => {
    const value = 110 * clamp((scan[index] - window[0]) / (window[1] - window[0]));
    const share = clamp(anomaly[index] / scaleMax);
    return hot(share).map((colour) => value * (1 - Math.min(1, 3 * share)) + colour * Math.min(1, 3 * share));
  });
  [grey(scan), grey(sample(volumes.counterpart)), map, grey(scan)].forEach((picture, column) => {
    context.drawImage(picture, x(column), y, width, height);
    drawSides(context, x(column), y, width, height);
  });
  drawScale(context, x(0), y + height, (width / grid.columns) / grid.spacing);
  drawOutlines(context, sample(volumes.labels), plane, grid, { x: x(3), y, scale: width / grid.columns });
  context.save();
  context.translate((LEFT_MM - 1) * MM, y + height / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  writeOn(context, `z = ${plane.z.toFixed(0).replace("-", "−")} mm`, 0, 0);
  context.restore();
}

const clamp = (value) => (value > 0 ? Math.min(1, value) : 0); // NaN is 0

function hot(share) {
  const above = HOT.findIndex(([at]) => at >= share);
  if (above <= 0) return HOT[0].slice(1);
  const [[low, ...from], [high, ...to]] = [HOT[above - 1], HOT[above]];
  return from.map((value, index) => value + ((to[index] - value) * (share - low)) / (high - low));
}

function toPicture({ columns, rows }, colourAt) {
  const picture = new OffscreenCanvas(columns, rows);
  const image = new ImageData(columns, rows);
  for (let index = 0; index < columns * rows; index += 1) image.data.set([...colourAt(index), 255], 4 * index);
  picture.getContext("2d").putImageData(image, 0, 0);
  return picture;
}

function writeOn(context, text, x, y, colour = "#111") {
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

/** Write on a picture: white with a black border. */
function writeOver(context, text, x, y) {
  context.strokeStyle = "#000";
  context.lineWidth = 0.6 * MM;
  context.lineJoin = "round";
  context.strokeText(text, x, y);
  writeOn(context, text, x, y, "#fff");
}

function drawSides(context, x, y, width, height) {
  const middle = y + height / 2;
  writeOver(context, "R", x + MM, middle);
  writeOver(context, "L", x + width - 2.8 * MM, middle);
  writeOver(context, "A", x + width / 2 - MM, y + 3 * MM);
}

function drawScale(context, x, bottom, pixelsPerMm) {
  const [left, y] = [x + 1.5 * MM, bottom - 1.5 * MM];
  context.fillStyle = "#fff";
  context.fillRect(left, y, 50 * pixelsPerMm, 0.4 * MM);
  for (const end of [left, left + 50 * pixelsPerMm]) context.fillRect(end, y - 0.6 * MM, 0.3 * MM, 1.4 * MM);
  writeOver(context, "5 cm", left, y - 1 * MM);
}

function drawOutlines(context, labels, plane, grid, { x, y, scale }) {
  const at = (column, row) => labels[row * grid.columns + column] || 0;
  const byLabel = new Map(plane.findings.map((finding) => [finding.label, finding]));
  for (const { label, loops } of traceOutlines(at, grid.columns, grid.rows)) {
    const finding = byLabel.get(label);
    const path = new Path2D();
    for (const [first, ...rest] of loops) {
      path.moveTo(x + first[0] * scale, y + first[1] * scale);
      for (const [a, b] of rest) path.lineTo(x + a * scale, y + b * scale);
      path.closePath();
    }
    context.setLineDash(finding?.isDoubtful ? [1.2 * MM, 0.8 * MM] : []);
    context.strokeStyle = finding?.isDoubtful ? "#ffd60a" : "#ff5c50";
    context.lineWidth = 0.35 * MM;
    context.stroke(path);
    context.setLineDash([]);
    const points = loops.flat();
    const right = Math.max(...points.map(([a]) => a));
    const top = Math.min(...points.map(([, b]) => b));
    writeOver(context, `${label}${finding?.isDoubtful ? "?" : ""}`, x + right * scale + MM, y + top * scale + 2 * MM);
  }
}

function drawColourBar(context, x, y, height, scaleMax, ticks) {
  const gradient = context.createLinearGradient(0, y + height, 0, y);
  for (const [share, ...colour] of HOT) gradient.addColorStop(share, `rgb(${colour.join(" ")})`);
  context.fillStyle = gradient;
  context.fillRect(x, y, 2 * MM, height);
  context.strokeStyle = "#111";
  context.lineWidth = 1;
  context.strokeRect(x, y, 2 * MM, height);
  context.save();
  context.font = `${2.3 * MM}px system-ui, "Liberation Sans", sans-serif`;
  for (const value of [0, ...ticks, scaleMax]) {
    const at = y + height * (1 - value / scaleMax);
    context.fillRect(x + 2 * MM, at, MM, 1);
    writeOn(context, String(Number(value.toFixed(3))), x + 2.4 * MM, Math.min(y + height, Math.max(y + 2 * MM, at + 0.8 * MM)));
  }
  context.restore();
}
