// The printable report of one scan.

import { getBytes, getJson } from "./api.js";
import { certaintyOf, collectWarnings, differenceInWords, isDoubtful, profileInWords, scanInWords } from "./certainty.js";
import { byId, el, formatPosition, formatTime, formatVolume, plural, problemCard } from "./dom.js";
import { drawFigure } from "./figure.js";
import { reviewInWords } from "./findings.js";
import { SCALE_FACTOR } from "./layers.js";
import { startPage } from "./page.js";
import { Volume } from "./volume.js";

const jobId = location.pathname.match(/\/scans\/([^/]+)\/print\/?$/)[1];
const jobPath = `v1/scans/${jobId}`;
const MAX_PLANES = 3;
const MAX_FINDINGS = 12;
const SAME_PLANE_MM = 6;

/** Return the planes of the surest findings: [{z, findings}]. Findings of one height share a plane. */
export function choosePlanes(findings) {
  const planes = [];
  for (const finding of findings) {
    const z = finding.key_z_mm ?? finding.centroid_mm[2];
    const near = planes.find((plane) => Math.abs(plane.z - z) < SAME_PLANE_MM);
    if (near) near.findings.push(finding);
    else if (planes.length < MAX_PLANES) planes.push({ z, findings: [finding] });
  }
  return planes;
}

async function showFigure(job, report, findings) {
  const names = ["image", "counterpart", "anomaly", "labels"];
  const [scan, counterpart, anomaly, labels] = await Promise.all(
    names.map(async (name) => Volume.read(await getBytes(job.links[name]), `${name}.nii.gz`)));
  const planes = choosePlanes(findings);
  if (planes.length === 0) planes.push({ z: (report.analysed.z_mm[0] + report.analysed.z_mm[1]) / 2, findings: [] });
  for (const plane of planes) plane.findings = findings; // outlines of other findings on the plane keep their style
  const scaleMax = SCALE_FACTOR * report.threshold;
  const isCt = report.input.modality === "CT";
  const window = isCt ? [0, 80] : scan.window;
  drawFigure(byId("figure"), { scan, counterpart, anomaly, labels }, planes, { window, scaleMax, ticks: [report.extent_threshold, report.threshold] });
  byId("caption").textContent =
    `Axial planes of the surest findings, radiological layout (patient's right on the left). Solid outline: clear finding. Dashed outline and "?": doubtful. ` +
    `Marks on the colour bar: ${report.extent_threshold} extent, ${report.threshold} finding. Window: ${window.map((value) => Number(value.toPrecision(4))).join(" to ")}.`;
}

function showFindings(findings, report, reviews) {
  const row = (finding) => {
    const verdicts = reviews?.filter((review) => review.label === finding.label).reverse() ?? [];
    return el(
      "tr", {},
      el("th", { scope: "row", text: `${finding.label}${isDoubtful(finding, report) ? "?" : ""}` }),
      el("td", { class: "number", text: formatVolume(finding.volume_ml) }),
      el("td", { class: "number", text: finding.peak_score.toFixed(3) }),
      el("td", { class: "number", text: finding.mean_score.toFixed(3) }),
      el("td", { text: differenceInWords(finding, report) }),
      el("td", { text: formatPosition(finding.centroid_mm) }),
      el("td", { text: certaintyOf(finding, report) }),
      el("td", {}, ...(verdicts.length ? verdicts.map((review) => el("div", { text: reviewInWords(review) })) : [reviews ? "none" : "not available"])),
    );
  };
  byId("findings").replaceChildren(...findings.slice(0, MAX_FINDINGS).map(row));
  if (findings.length === 0) byId("findings").append(el("tr", {}, el("td", { colspan: "8", text: "No finding: no region has a peak above the threshold." })));
  byId("more").hidden = findings.length <= MAX_FINDINGS;
  byId("more").textContent = `${findings.length - MAX_FINDINGS} further findings are in report.json.`;
}

const list = (id, rows) => byId(id).replaceChildren(...rows.flatMap(([name, text]) => [el("dt", { text: name }), el("dd", { text })]));

function showNumbers(job, report) {
  const { model, input, analysed, work } = report;
  const stages = Object.entries(work.seconds).map(([stage, seconds]) => `${stage} ${seconds.toFixed(1)}`).join(", ");
  list("result", [
    ["Scan as a whole", scanInWords(report)],
    ["Thresholds", `finding ${report.threshold}, extent ${report.extent_threshold}`],
    ["Site profile", profileInWords(report)],
    ["Analysed", `${analysed.volume_ml} ml, z = ${analysed.z_mm.join(" to ")} mm`],
    ["Input", `${input.format}, ${input.modality ?? "modality not stated"}, ${input.shape.join(" × ")}, ${input.spacing_mm.map((mm) => mm.toFixed(2)).join(" × ")} mm`],
  ]);
  list("provenance", [
    ["Scan", job.id],
    ["Model", `${model.id} (${model.licence})`],
    ["Bundle", `SHA-256 ${model.sha256.slice(0, 16)}…`],
    ["Computed on", `${model.provider}${model.precision ? `, ${model.precision}` : ""}, seed ${model.seed}`],
    ["Version", `Counterpart ${report.code_version}`],
    ["Finished", formatTime(job.ended)],
    ["Seconds", stages],
  ]);
}

async function readReviews(job) {
  try {
    return (await getJson(`${job.links.self}/reviews`)).reviews;
  } catch {
    return null; // an empty list would claim that there are none
  }
}

async function start() {
  byId("print").addEventListener("click", () => print());
  byId("back").href = location.pathname.replace(/\/print\/?$/, "");
  const ready = startPage();
  const sheet = document.querySelector(".sheet");
  try {
    const job = await getJson(jobPath);
    if (job.state !== "succeeded") throw Object.assign(new Error("not finished"), { problem: job.problem ?? { title: "The scan has no results", found: `The scan is ${job.state}.`, advice: "Open the scan in the viewer to follow it." } });
    const [report, reviews] = await Promise.all([getJson(job.links.report), readReviews(job)]);
    const findings = [...report.findings].sort((a, b) => b.peak_score - a.peak_score).map((finding) => ({ ...finding, isDoubtful: isDoubtful(finding, report) }));
    document.title = `Counterpart report ${job.id.slice(0, 8)}`;
    byId("title").textContent = `Counterpart report, scan ${job.id.slice(0, 8)}`;
    byId("printed").textContent = `printed ${formatTime(new Date())}`;
    const doubtful = findings.filter((finding) => finding.isDoubtful).length;
    byId("summary").textContent = findings.length
      ? `${plural(findings.length, "finding")}, ${formatVolume(report.lesion_volume_ml)} in total, ${doubtful} of them doubtful.`
      : "No finding.";
    const warnings = collectWarnings(report);
    byId("warnings").hidden = warnings.length === 0;
    byId("warnings").replaceChildren(...warnings.map(({ text, isWarning }) => el("li", { class: isWarning ? "warning" : "note" }, el("strong", { text: isWarning ? "Warning: " : "Note: " }), text)));
    showFindings(findings, report, reviews);
    showNumbers(job, report);
    await showFigure(job, report, findings);
    sheet.setAttribute("aria-busy", "false");
    document.body.dataset.ready = "true";
  } catch (error) {
    sheet.append(problemCard(error.problem ?? { title: "The page failed", found: error.message }));
    if (!error.problem) throw error;
  }
  await ready;
}

start();
