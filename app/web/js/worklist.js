// The worklist: all scans, live.

import { getJson, request } from "./api.js";
import { announce, ask, byId, problemCard } from "./dom.js";
import { bindKeys, may, startPage } from "./page.js";
import { isActive, renderRow } from "./rows.js";
import { Uploads } from "./upload.js";

const POLL_MILLISECONDS = 2000;
const PAGE = 50;

const KEYS = {
  created: (scan) => new Date(scan.created).getTime(),
  state: (scan) => ["running", "queued", "failed", "succeeded", "cancelled"].indexOf(scan.state),
  model: (scan) => scan.model ?? "",
  volume: (scan) => scan.lesion_volume_ml ?? -1,
  score: (scan) => scan.scan_score ?? -1,
  warnings: (scan) => scan.warnings_count ?? -1,
};

const scans = new Map();
const labels = new Map(); // names of files that this page sent; they stay in this page's memory
const rows = new Map();
let sort = { key: "created", descending: true };
let next = null;
let timer = null;

function query() {
  const parameters = new URLSearchParams({ limit: String(PAGE) });
  if (byId("filter-state").value) parameters.set("state", byId("filter-state").value);
  if (byId("filter-model").value) parameters.set("model", byId("filter-model").value);
  return `v1/scans?${parameters}`;
}

function matches(scan) {
  const text = byId("filter-text").value.trim().toLowerCase();
  const haystack = [scan.id, scan.model, scan.state, labels.get(scan.id), scan.problem?.title, scan.problem?.code];
  return haystack.filter(Boolean).join(" ").toLowerCase().includes(text);
}

function sorted() {
  const value = KEYS[sort.key];
  const sign = sort.descending ? -1 : 1;
  const compare = (a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0);
  return [...scans.values()].filter(matches).sort(compare);
}

/** Read the first page again, and the newest state of scans from later pages that are not finished. */
async function refresh() {
  try {
    const page = await getJson(query());
    const before = new Map(scans);
    const oldest = page.scans.at(-1);
    // Scans of the first page that it no longer contains were erased, or no longer match the filter.
    for (const [id, scan] of scans) if (!oldest || page.next === null || scan.created > oldest.created) scans.delete(id);
    for (const scan of page.scans) scans.set(scan.id, scan);
    if (next === null || scans.size <= PAGE) next = page.next;
    report(before);
    byId("connection").hidden = true;
    render();
  } catch (error) {
    if (error.problem?.status === 401) return;
    byId("connection").hidden = false;
    byId("connection").replaceChildren(problemCard(error.problem ?? { title: error.message }));
  }
}

function report(before) {
  for (const [id, scan] of scans) {
    const old = before.get(id);
    if (old && old.state !== scan.state) announce(`Scan ${labels.get(id) ?? id.slice(0, 8)}: ${scan.state}.`);
  }
}

async function loadMore() {
  const page = await getJson(next);
  for (const scan of page.scans) scans.set(scan.id, scan);
  next = page.next;
  render();
}

function render() {
  const body = byId("scans");
  const wanted = sorted();
  const focused = document.activeElement?.closest?.("tr")?.dataset.id;
  for (const [id, row] of rows) {
    if (!wanted.some((scan) => scan.id === id)) {
      row.remove();
      rows.delete(id);
    }
  }
  wanted.forEach((scan, index) => {
    const old = rows.get(scan.id);
    const row = renderRow(scan, labels.get(scan.id), old, actions);
    rows.set(scan.id, row);
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
  });
  if (focused && !rows.has(focused)) (body.children[0] ?? byId("sample")).focus();
  byId("empty").hidden = wanted.length > 0;
  byId("empty-filtered").hidden = scans.size === 0;
  byId("empty-first").hidden = scans.size > 0;
  byId("more").hidden = next === null;
  byId("count").textContent = summary(wanted);
  markSort();
}

function summary(shown) {
  const active = shown.filter(isActive).length;
  return `${shown.length} shown${active ? `, ${active} not finished` : ""}`;
}

const actions = {
  async cancel(scan) {
    const agreed = await ask({ title: "Cancel this scan?", text: "The analysis stops. The scan itself stays until it is deleted.", action: "Cancel the analysis" });
    if (agreed) await change(scan, "POST", scan.links.cancel);
  },
  async erase(scan) {
    const name = labels.get(scan.id) ?? scan.id.slice(0, 8);
    const agreed = await ask({
      title: `Delete scan ${name}?`,
      text: "The scan, its results and its reviews are erased from the service. This cannot be undone.",
      action: "Delete",
    });
    if (agreed) await change(scan, "DELETE", scan.links.self);
  },
};

async function change(scan, method, path) {
  try {
    await request(path, { method });
    announce(method === "DELETE" ? "The scan was deleted." : "The analysis was cancelled.");
  } catch (error) {
    byId("connection").hidden = false;
    byId("connection").replaceChildren(problemCard(error.problem ?? { title: error.message }));
  }
  await refresh();
}

function markSort() {
  for (const header of document.querySelectorAll("th[data-sort]")) {
    const isSorted = header.dataset.sort === sort.key;
    header.setAttribute("aria-sort", isSorted ? (sort.descending ? "descending" : "ascending") : "none");
  }
}

function bindSort() {
  for (const header of document.querySelectorAll("th[data-sort]")) {
    header.querySelector("button").addEventListener("click", () => {
      const { sort: key } = header.dataset;
      sort = { key, descending: sort.key === key ? !sort.descending : true };
      render();
    });
  }
}

function bindFilters() {
  byId("filter-text").addEventListener("input", render);
  for (const id of ["filter-state", "filter-model"]) {
    byId(id).addEventListener("change", () => {
      scans.clear();
      next = null;
      refresh();
    });
  }
  byId("more").addEventListener("click", loadMore);
}

async function fillModels() {
  const { models } = await getJson("v1/models");
  for (const model of models) {
    for (const id of ["filter-model", "send-model"]) byId(id).add(new Option(`${model.id} · ${model.modality} ${model.sequence}`, model.id));
  }
}

// --- keys ---

const focusedRow = () => document.activeElement?.closest?.("#scans tr");

function move(step) {
  const all = [...byId("scans").children];
  const index = all.indexOf(focusedRow());
  const target = all[Math.min(all.length - 1, Math.max(0, index + step))];
  target?.focus();
  target?.scrollIntoView({ block: "nearest" });
}

function onRow(action) {
  return () => {
    const scan = scans.get(focusedRow()?.dataset.id);
    if (!scan) return false;
    action(scan);
    return true;
  };
}

bindKeys({
  j: () => move(1),
  ArrowDown: () => move(1),
  k: () => move(-1),
  ArrowUp: () => move(-1),
  "/": () => byId("filter-text").focus(),
  Delete: onRow((scan) => actions.erase(scan)),
  c: onRow((scan) => (isActive(scan) ? actions.cancel(scan) : null)),
  Enter: (event) => {
    if (event.target.tagName !== "TR") return false;
    event.target.querySelector("a.open").click();
    return true;
  },
});
byId("filter-text").addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    event.target.value = "";
    render();
    event.target.blur();
  }
});

// --- start ---

function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  refresh().finally(() => { timer = setTimeout(poll, POLL_MILLISECONDS); });
}

document.addEventListener("visibilitychange", poll);
bindSort();
bindFilters();
new Uploads((job, label) => {
  labels.set(job.id, label);
  scans.set(job.id, { warnings_count: null, ...job });
  render();
  rows.get(job.id)?.focus();
});
// The list and the session are read at the same time: the first picture must not wait.
poll();
fillModels().catch(() => {});
await startPage();
document.querySelector(".send").hidden = !may("send");
