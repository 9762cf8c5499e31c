// The viewer of one scan: follows the job, then shows pictures, layers and findings.

import { followEvents, getBytes, getJson, getPicture } from "./api.js";
import { collectWarnings, profileInWords, scanInWords, scoreOf } from "./certainty.js";
import { Comparison } from "./compare.js";
import { announce, byId, el, formatPosition, formatTime, problemCard } from "./dom.js";
import { Findings } from "./findings.js";
import { Layers } from "./layers.js";
import { bindKeys, startPage } from "./page.js";

const isEmbedded = /\/embed\/[^/]+\/?$/.test(location.pathname);
const jobId = location.pathname.match(/\/(?:scans|embed)\/([^/]+)\/?$/)[1];
const jobPath = `v1/scans/${jobId}`;
const STAGES = { read: "Reading the scan", infer: "Comparing the scan with its counterpart", export: "Writing the results" };
// Values below cal_min are transparent, and colours begin at 0, so that the threshold does not change them.
const MAP_STYLE = { colormapType: 1 };
const SLICE_INPUTS = { axial: 2, coronal: 1, sagittal: 0 };

const scenes = [];
const layers = new Layers(scenes);
let scan = null; // the scene of the scan
let findings = null;
let comparison = null;
let images = {}; // labels and map, shared by the scenes

document.body.classList.toggle("embedded", isEmbedded);

// --- a job that is not finished ---

function showProgress(job) {
  const card = byId("progress");
  card.hidden = false;
  const percent = Math.round((job.percent ?? job.progress * 100) || 0);
  const left = job.seconds_left ? `, about ${Math.ceil(job.seconds_left)} s left` : "";
  const text = job.state === "queued" ? `Waiting: number ${job.queue_position ?? "?"} in the queue` : `${STAGES[job.stage] ?? "Starting"}: ${percent} %${left}`;
  card.replaceChildren(el("p", { text }), el("progress", { max: "100", value: String(percent), "aria-label": "Progress of the analysis" }));
  announce(job.state === "queued" ? text : `${STAGES[job.stage] ?? "Starting"}, ${Math.floor(percent / 25) * 25} %`);
}

async function waitForEnd(job) {
  let current = job;
  while (current.state === "queued" || current.state === "running") {
    showProgress(current);
    try {
      for await (const { data } of followEvents(`${jobPath}/events`)) if (data.state === "queued" || data.state === "running") showProgress(data);
    } catch {
      await new Promise((resolve) => { setTimeout(resolve, 2000); }); // too many streams, or a restart
    }
    current = await getJson(jobPath);
  }
  byId("progress").hidden = true;
  return current;
}

function showEnd(problem) {
  byId("progress").hidden = false;
  byId("progress").replaceChildren(problemCard(problem));
}

// --- a finished job ---

function showWarnings(report) {
  const items = collectWarnings(report);
  byId("warnings").hidden = items.length === 0;
  byId("warnings").replaceChildren(...items.map(({ text, isWarning }) =>
    el("li", { class: isWarning ? "warning" : "note" }, el("strong", { text: isWarning ? "⚠ Warning: " : "Note: " }), text)));
}

function showCertainty(report) {
  const { score, range: healthy } = scoreOf(report);
  const top = Math.max(score, healthy.high) * 1.15;
  const bar = el("div", { class: "range", "aria-hidden": "true" }, el("span", { class: "healthy" }), el("span", { class: "mark" }));
  bar.style.setProperty("--low", `${(100 * healthy.low) / top}%`);
  bar.style.setProperty("--high", `${(100 * healthy.high) / top}%`);
  bar.style.setProperty("--at", `${(100 * score) / top}%`);
  byId("certainty").replaceChildren(
    el("p", { text: `The scan as a whole. ${scanInWords(report)}` }),
    bar,
    el("p", { class: "quiet", text: "A finding is clear if its peak is at least 1.5 times the threshold, otherwise doubtful. Healthy scans show doubtful findings too. The score is not the probability of a disease." }),
  );
}

function showAbout(job, report) {
  const seconds = Object.values(report.work.seconds).reduce((sum, value) => sum + value, 0);
  const rows = [
    ["Model", report.model.id],
    ["Selected by", { caller: "the sender", sequence: "the sequence", modality: "the modality", default: "no other model" }[report.model.selection?.by] ?? "–"],
    ["Site profile", profileInWords(report)],
    ["Input", `${report.input.format}, ${report.input.modality ?? "modality not stated"}, ${report.input.shape.join(" × ")}, ${report.input.spacing_mm.map((mm) => mm.toFixed(2)).join(" × ")} mm`],
    ["Analysed", `${report.analysed.volume_ml} ml, z = ${report.analysed.z_mm.join(" to ")} mm, ${report.analysed.slices - report.analysed.slices_not_analysed.length} of ${report.analysed.slices} slices`],
    ["Time", `${seconds.toFixed(1)} s on ${report.model.provider}`],
    ["Finished", formatTime(job.ended)],
    ["Version", `Counterpart ${report.code_version}, seed ${report.model.seed}`],
    ["Licence", report.model.licence],
  ];
  byId("about").replaceChildren(...rows.flatMap(([name, text]) => [el("dt", { text: name }), el("dd", { text })]));
}

function showActions(job) {
  const link = (text, href, properties = {}) => el("a", { class: "button", text, href, ...properties });
  const own = `${location.origin}${location.pathname}`;
  byId("scan-actions").replaceChildren(
    ...(isEmbedded ? [] : [link("Print", `${own.replace(/\/$/, "")}/print`)]),
    link("Mask", job.links.mask, { download: "" }),
    link("Report", job.links.report, { download: "" }),
  );
}

async function loadPicture(job, report) {
  const { hasWebGl2, readNifti, Scene } = await import("./scene.js");
  if (!hasWebGl2()) {
    byId("progress").hidden = false;
    byId("progress").replaceChildren(el("p", { text: "This browser has no WebGL 2, so the volume cannot be shown. The preview above shows the findings." }));
    return;
  }
  const read = async (name, options) => readNifti(await getBytes(job.links[name], showLoading(name)), `${name}.nii.gz`, options);
  // All downloads start at once. The scan is drawn first.
  const labels = read("labels");
  const map = read("anomaly", { colormap: "hot" });
  labels.catch(() => {});
  map.catch(() => {});
  const base = await read("image", { colormap: "gray" });
  byId("scan-scene").hidden = false;
  scan = await new Scene(byId("scan-scene"), "Scan with the findings. Use the slice sliders or the arrow keys to move.").start();
  const isCt = report.input.modality === "CT" || (await isCtModel(report.model.id));
  scan.setBase(base, layers.setBase(base, isCt));
  scenes.push(scan);
  scan.onMove = showPosition;
  scan.onWindow = () => layers.showWindow(scan);
  bindSlices();
  byId("toolbar").hidden = byId("slices").hidden = false;
  comparison = new Comparison(scan, () => openCounterpart(job, readNifti, Scene), (isHidden) => layers.hideMap(isHidden));
  showPosition();
  byId("first-picture").hidden = true;
  images = { labels: await labels, anomaly: await map };
  dress(scan);
  byId("progress").hidden = true;
  document.body.dataset.ready = "true";
  announce("The pictures are loaded.");
  bindMaps(job, read);
}

const isCtModel = async (id) => {
  const { models } = await getJson("v1/models");
  return models.find((model) => model.id === id)?.modality === "CT";
};

/** Show mask, map and numbers in a scene. */
function dress(scene, { withMap = true } = {}) {
  scene.setMask(images.labels);
  scene.annotations.findings = findings.list;
  scene.colourMask(findings.list);
  if (withMap) showMap(scene, images.anomaly);
  layers.apply();
}

function showMap(scene, image) {
  scene.setMap(Object.assign(image, MAP_STYLE, { cal_min: layers.mapThreshold, cal_max: layers.scaleMax }));
}

async function openCounterpart(job, readNifti, Scene) {
  const bytes = await getBytes(job.links.counterpart, showLoading("counterpart"));
  const scene = await new Scene(byId("counterpart-scene"), "Healthy counterpart with linked crosshair.").start();
  scene.setBase(await readNifti(bytes, "counterpart.nii.gz", { colormap: "gray" }), layers.window);
  scene.setRadiological(isRadiological());
  scene.onMove = () => showPosition(scene);
  scene.onWindow = () => layers.showWindow(scene);
  scenes.push(scene);
  dress(scene, { withMap: false });
  byId("progress").hidden = true;
  return scene;
}

function showLoading(name) {
  return (fraction) => {
    const card = byId("progress");
    card.hidden = false;
    card.replaceChildren(el("p", { text: `Loading ${name}` }), el("progress", { max: "1", value: String(fraction), "aria-label": `Loading ${name}` }));
  };
}

function bindMaps(job, read) {
  byId("uncertainty-choice").hidden = !job.links.uncertainty;
  for (const input of document.querySelectorAll("input[name=map]")) {
    input.addEventListener("change", async () => {
      images[input.value] ??= await read(input.value, { colormap: "viridis" });
      layers.setMapScale(input.value, images[input.value]);
      showMap(scan, images[input.value]);
      layers.apply();
      showPosition();
      byId("progress").hidden = true;
    });
  }
}

// --- position and slices ---

function bindSlices() {
  for (const [id, axis] of Object.entries(SLICE_INPUTS)) {
    byId(id).max = String(scan.shape[axis] - 1);
    byId(id).addEventListener("input", () => scan.moveToSlice(axis, Number(byId(id).value)));
  }
}

function showPosition(scene = scan) {
  const mm = scene.positionMm;
  const { voxel, shape } = scene;
  for (const [id, axis] of Object.entries(SLICE_INPUTS)) {
    const index = Math.min(shape[axis] - 1, Math.max(0, Math.round(voxel[axis])));
    byId(id).value = String(index);
    byId(id).setAttribute("aria-valuetext", `slice ${index + 1} of ${shape[axis]}, ${mm[axis].toFixed(1)} mm`);
    byId(`${id}-at`).value = `${index + 1} / ${shape[axis]}`;
  }
  const output = byId("position");
  output.dataset.mm = mm.map((value) => value.toFixed(2)).join(" ");
  const parts = [`${formatPosition(mm)} mm (R A S)`];
  if (images.anomaly) {
    const value = scene.valueOf(images.anomaly);
    parts.push(Number.isFinite(value) ? `map ${value.toFixed(3)}` : "map –");
    const label = scene.valueOf(images.labels);
    if (label > 0) parts.push(`finding ${label}`);
  }
  output.value = parts.join("  ·  ");
}

function selectFinding(finding) {
  history.replaceState(null, "", `${location.pathname}#finding=${finding.label}`);
  if (!scan) return;
  for (const scene of scenes) scene.colourMask(findings.list);
  scan.moveTo(finding.centroid_mm);
}

function followHash() {
  const label = Number(location.hash.match(/finding=(\d+)/)?.[1]);
  if (label) findings?.select(label);
}

// --- toolbar and keys ---

const isRadiological = () => byId("convention").getAttribute("aria-pressed") === "true";

function setConvention(isOn) {
  const button = byId("convention");
  button.setAttribute("aria-pressed", String(isOn));
  button.textContent = isOn ? "Radiological: R is left" : "Neurological: R is right";
  for (const scene of scenes) scene.setRadiological(isOn);
}

function setView(name) {
  document.querySelector(`input[name=view][value=${name}]`).checked = true;
  scan.setView(name);
}

function stepSlice(step) {
  const view = document.querySelector("input[name=view]:checked").value;
  const id = view in SLICE_INPUTS ? view : "axial";
  const axis = SLICE_INPUTS[id];
  scan.moveToSlice(axis, Math.min(scan.shape[axis] - 1, Math.max(0, Number(byId(id).value) + step)));
}

function bindControls() {
  for (const input of document.querySelectorAll("input[name=view]")) input.addEventListener("change", () => setView(input.value));
  // A choice with the mouse gives the arrow keys back to the slices.
  for (const input of document.querySelectorAll("input[type=radio]")) {
    input.addEventListener("click", (event) => { if (event.detail > 0) input.blur(); });
  }
  byId("convention").addEventListener("click", () => setConvention(!isRadiological()));
  const whenLoaded = (action) => (event) => {
    if (!scan) return false;
    return action(event);
  };
  const arrow = (step) => whenLoaded((event) => (event.target.matches("input, [role=radio], summary") ? false : stepSlice(step)));
  bindKeys({
    n: () => findings?.step(1),
    p: () => findings?.step(-1),
    ArrowUp: arrow(1),
    ArrowDown: arrow(-1),
    ...Object.fromEntries(["multi", "axial", "coronal", "sagittal", "render"].map((view, index) => [String(index + 1), whenLoaded(() => setView(view))])),
    o: whenLoaded(() => layers.nextMaskStyle()),
    m: whenLoaded(() => layers.toggleMap()),
    s: whenLoaded(() => void comparison.toggle("side")),
    x: whenLoaded(() => void comparison.toggle("swipe")),
    f: whenLoaded(() => void comparison.toggle("flicker")),
    Escape: whenLoaded(() => (comparison.mode === "off" ? false : void comparison.set("off"))),
    " ": whenLoaded((event) => (comparison.mode === "flicker" && !event.target.matches("button, input, tr") ? comparison.step() : false)),
    l: () => setConvention(!isRadiological()),
    r: () => void findings?.review("right"),
    w: () => void findings?.review("wrong"),
    u: () => void findings?.review("unsure"),
  });
}

// --- start ---

async function showResult(job) {
  const preview = byId("first-picture");
  getPicture(job.links.preview).then((address) => { preview.src = address; }, () => {});
  preview.hidden = false;
  byId("panel").hidden = false;
  const report = await getJson(job.links.report);
  showWarnings(report);
  showCertainty(report);
  showAbout(job, report);
  showActions(job);
  layers.setReport(report);
  findings = new Findings(job, report, selectFinding);
  await loadPicture(job, report);
  addEventListener("hashchange", followHash);
  if (location.hash) followHash();
  else if (findings.list.length) findings.select(findings.list[0].label);
}

async function start() {
  byId("title").textContent = `Scan ${jobId.slice(0, 8)}`;
  document.title = `Scan ${jobId.slice(0, 8)} – Counterpart`;
  try {
    const job = await waitForEnd(await getJson(jobPath));
    if (job.state === "succeeded") await showResult(job);
    else if (job.state === "failed") showEnd(job.problem);
    else showEnd({ title: "The analysis was cancelled", found: "There are no results.", advice: "Send the scan again.", code: "cancelled" });
  } catch (error) {
    if (error.problem?.status !== 401) showEnd(error.problem ?? { title: "The page failed", found: error.message, advice: "Load the page again.", code: "page_error" });
    if (!error.problem) throw error;
  }
}

bindControls();
addEventListener("logged-in", start);
await startPage();
start();
