// Sending of scans: dropped files and folders, chosen files, the sample.

import { request, upload } from "./api.js";
import { announce, byId, el, plural, problemCard } from "./dom.js";

/** Return all files of dropped items. Folders are read to their last level. */
export async function collectFiles(items) {
  // Entries must be taken before the first await: the browser empties the list after the event.
  const entries = [...items].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry());
  const files = await Promise.all(entries.filter(Boolean).map(readEntry));
  return files.flat();
}

async function readEntry(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const children = [];
  // One call returns at most 100 entries.
  for (;;) {
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (batch.length === 0) break;
    children.push(...batch);
  }
  return (await Promise.all(children.map(readEntry))).flat();
}

// Names that systems put beside scans. They are no images.
const isClutter = ({ name }) => name.startsWith(".") || /^(thumbs\.db|desktop\.ini|dicomdir)$/i.test(name);

/** Return the body of the request. File names can contain a patient's name, so they are not sent. */
export function toBody(files) {
  if (files.length === 1) return files[0];
  const form = new FormData();
  files.forEach((file, index) => form.append("file", file, String(index)));
  return form;
}

/** The panel that sends scans and shows each upload until its job exists. */
export class Uploads {
  /** `onJob(job, label)` is called with each new job. */
  constructor(onJob) {
    this._onJob = onJob;
    this._list = byId("uploads");
    byId("choose-files").addEventListener("click", () => byId("files").click());
    byId("choose-folder").addEventListener("click", () => byId("folder").click());
    byId("files").addEventListener("change", (event) => this._sendChosen(event.target, { isFolder: false }));
    byId("folder").addEventListener("change", (event) => this._sendChosen(event.target, { isFolder: true }));
    byId("sample").addEventListener("click", () => this.sendSample());
    this._bindDrop();
  }

  async send(files, label) {
    const wanted = files.filter((file) => !isClutter(file));
    if (wanted.length === 0) return;
    const stop = new AbortController();
    const card = this._card(label, wanted.length, stop);
    try {
      const job = await upload(`v1/scans${this._query()}`, toBody(wanted), { onProgress: card.progress, signal: stop.signal });
      card.remove();
      announce(`${label} was sent.`);
      this._onJob(job, label);
    } catch (error) {
      if (error.name === "AbortError") card.remove();
      else card.fail(error.problem);
    }
  }

  async sendSample() {
    const card = this._card("sample scan", 1, new AbortController());
    try {
      const response = await request("v1/scans/sample", { method: "POST" });
      card.remove();
      this._onJob(await response.json(), "sample scan");
    } catch (error) {
      card.fail(error.problem ?? { title: error.message });
    }
  }

  _query() {
    const query = new URLSearchParams();
    if (byId("send-model").value) query.set("model", byId("send-model").value);
    if (byId("send-stat").checked) query.set("priority", "stat");
    if (byId("send-resample").checked) query.set("geometry", "resample");
    return query.size ? `?${query}` : "";
  }

  _sendChosen(input, { isFolder }) {
    const files = [...input.files];
    input.value = "";
    // Each chosen file is a scan of its own. The files of a folder are one DICOM series.
    if (isFolder) this.send(files, files[0]?.webkitRelativePath.split("/")[0] ?? "folder");
    else files.forEach((file) => this.send([file], file.name));
  }

  _bindDrop() {
    const zone = byId("drop");
    let depth = 0;
    const show = (change) => {
      depth = Math.max(0, depth + change);
      zone.classList.toggle("shown", depth > 0);
    };
    addEventListener("dragenter", (event) => { event.preventDefault(); show(1); });
    addEventListener("dragleave", () => show(-1));
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", async (event) => {
      event.preventDefault();
      show(-depth);
      const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
      const hasFolder = entries.some((entry) => entry.isDirectory);
      const label = entries[0]?.name ?? "scan";
      const files = await collectFiles(event.dataTransfer.items);
      // DICOM files of one drop are one series; several NIfTI files or archives are several scans.
      const isOneScan = hasFolder || files.length === 1 || files.every((file) => !/\.(nii|mgh|mgz|zip|gz)$/i.test(file.name));
      if (isOneScan) this.send(files, label);
      else files.forEach((file) => this.send([file], file.name));
    });
  }

  _card(label, count, stop) {
    const bar = el("progress", { max: "1", value: "0", "aria-label": `Upload of ${label}` });
    const share = el("span", { class: "quiet", text: "0 %" });
    const cancel = el("button", { text: "Stop", on: { click: () => stop.abort() } });
    const detail = count > 1 ? ` (${plural(count, "file")})` : "";
    const card = el("li", {}, el("span", { class: "name", text: `Sending ${label}${detail}` }), bar, share, cancel);
    this._list.append(card);
    return {
      remove: () => card.remove(),
      progress: (fraction) => {
        bar.value = fraction;
        share.textContent = fraction < 1 ? `${Math.round(fraction * 100)} %` : "the service reads the scan …";
      },
      fail: (problem) => {
        const dismiss = el("button", { text: "Dismiss", on: { click: () => card.remove() } });
        card.replaceChildren(problemCard(problem, `${label}: ${problem.title}`), dismiss);
      },
    };
  }
}
