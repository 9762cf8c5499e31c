// One row of the worklist.

import { ROOT } from "./api.js";
import { may } from "./page.js";
import { el, formatAge, formatNumber, formatTime, formatVolume, plural } from "./dom.js";

const STAGES = { read: "reading", infer: "comparing", export: "writing" };
// A symbol and a word: colour is never the only sign.
const STATES = {
  queued: ["◷", "waiting"],
  running: ["▶", "running"],
  succeeded: ["✓", "finished"],
  failed: ["✕", "failed"],
  cancelled: ["–", "cancelled"],
};
const DOWNLOADS = [
  ["mask", "mask.nii.gz"],
  ["labels", "labels.nii.gz"],
  ["anomaly", "anomaly.nii.gz"],
  ["counterpart", "counterpart.nii.gz"],
  ["uncertainty", "uncertainty.nii.gz"],
  ["image", "image.nii.gz"],
  ["brain", "brain.nii.gz"],
  ["segmentation", "segmentation.dcm"],
  ["structured_report", "report.dcm"],
  ["report", "report.json"],
  ["preview", "preview.png"],
];

export const isActive = (scan) => scan.state === "queued" || scan.state === "running";

/** Return the row of a scan. The old row is returned if nothing changed, so that focus and menus stay. */
export function renderRow(scan, label, old, actions) {
  const version = JSON.stringify([scan, label]);
  if (old?.dataset.version === version) {
    old.querySelector("time").textContent = formatAge(scan.created);
    return old;
  }
  const row = old ?? el("tr", { tabindex: "0" });
  row.dataset.id = scan.id;
  row.dataset.version = version;
  row.dataset.state = scan.state;
  const hadFocus = row.contains(document.activeElement) && row !== document.activeElement;
  row.replaceChildren(
    el("td", { class: "thumb" }, thumbnail(scan)),
    el("td", {}, name(scan, label)),
    el("td", { class: "state" }, state(scan)),
    el("td", { text: scan.model ?? "automatic" }),
    el("td", {}, el("time", { datetime: scan.created, title: formatTime(scan.created), text: formatAge(scan.created) })),
    el("td", { class: "number" }, findings(scan)),
    el("td", { class: "number", text: formatNumber(scan.scan_score, 2) }),
    el("td", {}, warnings(scan)),
    el("td", {}, reviews(scan)),
    el("td", { class: "actions" }, ...buttons(scan, actions)),
  );
  if (hadFocus) row.focus();
  return row;
}

function thumbnail(scan) {
  const link = scan.links.thumbnail;
  if (!link) return el("span", { class: "no-picture", "aria-hidden": "true" });
  return el("img", { src: link, alt: "", width: "64", height: "64", loading: "lazy", decoding: "async" });
}

function name(scan, label) {
  const stat = scan.priority === "stat" ? el("span", { class: "tag stat", text: "stat" }) : null;
  return el(
    "div", { class: "name" },
    el("a", { class: "open", href: new URL(`scans/${scan.id}`, ROOT).href, tabindex: "-1", text: label ?? scan.id.slice(0, 8) }),
    stat,
    label ? el("span", { class: "quiet", text: scan.id.slice(0, 8) }) : null,
  );
}

function state(scan) {
  const [symbol, word] = STATES[scan.state];
  const line = el("span", { class: `is-${scan.state}` }, el("span", { "aria-hidden": "true", text: `${symbol} ` }), word);
  if (scan.state === "queued") {
    const place = scan.queue_position ? `, number ${scan.queue_position} in the queue` : "";
    return el("div", {}, line, place);
  }
  if (scan.state === "running") {
    const percent = Math.round(scan.progress * 100);
    const bar = el("progress", { max: "100", value: String(percent), "aria-label": `Progress of scan ${scan.id.slice(0, 8)}` });
    return el("div", {}, line, ` · ${STAGES[scan.stage] ?? "starting"} · ${percent} %`, bar);
  }
  if (scan.state === "failed" && scan.problem) return el("div", {}, line, failure(scan.problem));
  return line;
}

function failure(problem) {
  const parts = [["Found", problem.found], ["Expected", problem.expected], ["What to do", problem.advice]];
  return el(
    "details", { class: "failure" },
    el("summary", { text: problem.title }),
    el("dl", {}, ...parts.filter(([, text]) => text).flatMap(([term, text]) => [el("dt", { text: term }), el("dd", { text })])),
    el("code", { text: problem.code }),
  );
}

function findings(scan) {
  if (scan.lesion_volume_ml === null || scan.lesion_volume_ml === undefined) return "–";
  if (scan.findings_count === 0) return "none";
  return el("span", {}, formatVolume(scan.lesion_volume_ml), el("br"), el("span", { class: "quiet", text: plural(scan.findings_count, "finding") }));
}

function warnings(scan) {
  if (!scan.warnings_count) return "–";
  return el("span", { class: "warning", text: `⚠ ${plural(scan.warnings_count, "warning")}` });
}

function reviews(scan) {
  const { right = 0, wrong = 0, unsure = 0 } = scan.reviews ?? {};
  if (right + wrong + unsure === 0) return "–";
  return el("span", { text: `✓ ${right}  ✕ ${wrong}  ? ${unsure}`, title: `${right} right, ${wrong} wrong, ${unsure} unsure` });
}

function buttons(scan, actions) {
  const short = scan.id.slice(0, 8);
  const erase = !may("erase") ? null : el("button", { class: "quiet-button", "aria-label": `Delete scan ${short}`, text: "Delete", on: { click: () => actions.erase(scan) } });
  if (isActive(scan)) {
    return !erase ? [] : [el("button", { class: "quiet-button", "aria-label": `Cancel scan ${short}`, text: "Cancel", on: { click: () => actions.cancel(scan) } }), erase];
  }
  if (scan.state !== "succeeded") return [erase].filter(Boolean);
  const files = DOWNLOADS.filter(([link]) => scan.links[link]);
  const menu = el(
    "details", { class: "menu" },
    el("summary", { "aria-label": `Download results of scan ${short}`, text: "Download" }),
    el("ul", {}, ...files.map(([link, file]) => el("li", {}, el("a", { href: scan.links[link], download: `${short}-${file}`, text: file })))),
  );
  return [el("a", { class: "button quiet-button", "aria-label": `Print scan ${short}`, href: new URL(`scans/${scan.id}/print`, ROOT).href, text: "Print" }), menu, erase].filter(Boolean);
}
