// The list of findings, and the reader's reviews.

import { getJson, request, sendJson } from "./api.js";
import { certaintyOf, differenceInWords, isDoubtful } from "./certainty.js";
import { announce, byId, el, formatPosition, formatVolume, plural } from "./dom.js";
import { getSession } from "./page.js";

const VERDICTS = { right: "✓ right", wrong: "✕ wrong", unsure: "? unsure" };
const READER_KEY = "counterpart-reader";
// The limit of the service.
const MAX_NOTE = 1000;

/** Return a verdict with its reader and note, such as "wrong by A: Motion." */
export function reviewInWords({ verdict, reader, note }) {
  return `${verdict}${reader ? ` by ${reader}` : ""}${note ? `: ${note}` : ""}`;
}

/** The list. `onSelect(finding)` moves the crosshair. */
export class Findings {
  constructor(job, report, onSelect) {
    this._path = `${job.links.self}/reviews`;
    this._report = report;
    this._onSelect = onSelect;
    this.list = [...report.findings]
      .sort((a, b) => b.peak_score - a.peak_score || a.label - b.label)
      .map((finding) => ({ ...finding, isDoubtful: isDoubtful(finding, report), isSelected: false }));
    this._reviews = []; // the latest verdict of each reader on each finding, the newest last
    this._notes = new Map();
    this._canReview = false;
    this._render();
    this._loadReviews();
  }

  get selected() {
    return this.list.find((finding) => finding.isSelected);
  }

  select(label) {
    const finding = this.list.find((candidate) => candidate.label === label);
    if (!finding) return;
    for (const other of this.list) other.isSelected = other === finding;
    this._render();
    this._onSelect(finding);
    announce(`Finding ${label}, ${formatVolume(finding.volume_ml)}, ${certaintyOf(finding, this._report)}.`);
  }

  /** Select the next (1) or previous (-1) finding. */
  step(direction) {
    if (this.list.length === 0) return;
    const index = this.list.indexOf(this.selected);
    const following = index < 0 ? 0 : (index + direction + this.list.length) % this.list.length;
    this.select(this.list[following].label);
  }

  async review(verdict) {
    const finding = this.selected;
    if (!finding || !this._canReview) return;
    const note = byId("review-note")?.value ?? "";
    try {
      const response = await sendJson("PUT", `${this._path}/${finding.label}`, { verdict, note, reader: this._reader ?? "" });
      const review = await response.json();
      const isSuperseded = (earlier) => earlier.label === review.label && earlier.reader === review.reader;
      this._reviews = [...this._reviews.filter((earlier) => !isSuperseded(earlier)), review];
      this._notes.delete(finding.label);
      announce(`Finding ${finding.label} is marked as ${verdict}.`);
      this._render();
    } catch (error) {
      byId("review-fault").textContent = `${error.problem?.title ?? error.message}. ${error.problem?.advice ?? ""}`;
    }
  }

  async withdraw() {
    const review = this._ownReview(this.selected?.label);
    if (!review) return;
    await request(`${this._path}/${review.label}?reader=${encodeURIComponent(review.reader)}`, { method: "DELETE" });
    await this._loadReviews();
  }

  /** The reader of this page: the actor of the login (null if unknown); without a login, the name that was typed. */
  get _reader() {
    const { login, actor } = getSession();
    return login === "none" ? (sessionStorage.getItem(READER_KEY) ?? "") : actor;
  }

  _reviewsOf(label) {
    return this._reviews.filter((review) => review.label === label);
  }

  _ownReview(label) {
    return this._reviewsOf(label).find((review) => review.reader === this._reader);
  }

  async _loadReviews() {
    try {
      const { reviews } = await getJson(this._path);
      this._canReview = true;
      this._reviews = reviews;
    } catch {
      this._canReview = false; // a service without reviews
    }
    this._render();
  }

  _render() {
    const doubtful = this.list.filter((finding) => finding.isDoubtful).length;
    const parts = doubtful ? `, ${doubtful} of them doubtful` : "";
    byId("findings-summary").textContent = this.list.length
      ? `${plural(this.list.length, "finding")}, ${formatVolume(this._report.lesion_volume_ml)} in total${parts}.`
      : "No finding: no region has a peak above the threshold.";
    byId("findings-table").hidden = this.list.length === 0;
    const focused = document.activeElement?.closest?.("#findings tr")?.dataset.label;
    byId("findings").replaceChildren(...this.list.map((finding) => this._row(finding)));
    if (focused) byId("findings").querySelector(`tr[data-label="${focused}"]`)?.focus();
    this._renderDetail();
  }

  _row(finding) {
    const given = this._reviewsOf(finding.label).map((review) => review.verdict);
    const verdicts = Object.keys(VERDICTS).filter((verdict) => given.includes(verdict)).map((verdict) => VERDICTS[verdict]);
    const select = () => this.select(finding.label);
    return el(
      "tr", {
        "data-label": finding.label,
        class: finding.isDoubtful ? "doubtful" : "clear",
        tabindex: "0",
        "aria-selected": String(finding.isSelected),
        on: {
          click: select,
          keydown: (event) => {
            if (event.key !== "Enter" && event.key !== " ") return;
            event.preventDefault();
            select();
          },
        },
      },
      el("th", { scope: "row", text: `${finding.label}${finding.isDoubtful ? "?" : ""}` }),
      el("td", { class: "number", text: formatVolume(finding.volume_ml) }),
      el("td", { class: "number", text: finding.peak_score.toFixed(2) }),
      el("td", {}, el("span", { class: "nowrap", text: formatPosition(finding.centroid_mm, 0) }), el("span", { class: "certainty", text: finding.isDoubtful ? "doubtful" : "clear" })),
      el("td", { text: verdicts.join(", ") || "–" }),
    );
  }

  _renderDetail() {
    const finding = this.selected;
    const box = byId("finding-detail");
    box.hidden = !finding;
    if (!finding) return;
    const difference = differenceInWords(finding, this._report, " than the counterpart");
    box.replaceChildren(...[
      el("p", {}, el("strong", { text: `Finding ${finding.label}` }), ` is ${certaintyOf(finding, this._report)} (${this._report.threshold}). Its centre is at ${formatPosition(finding.centroid_mm)} mm.`),
      difference && el("p", { text: `On average, it is ${difference}.` }),
      this._canReview ? this._form(finding) : null,
    ].filter(Boolean));
  }

  _form(finding) {
    const keep = (event) => this._notes.set(finding.label, event.target.value);
    const note = el("textarea", { id: "review-note", rows: "2", maxlength: MAX_NOTE, on: { input: keep } });
    const verdicts = Object.entries(VERDICTS).map(([verdict, text]) =>
      el("button", { text, "data-verdict": verdict, on: { click: () => this.review(verdict) } }));
    const status = el("p", { class: "quiet" });
    const others = el("div", { id: "other-reviews" });
    const showReviews = () => {
      const own = this._ownReview(finding.label);
      const foreign = this._reviewsOf(finding.label).filter((review) => review !== own).reverse();
      note.value = this._notes.get(finding.label) ?? own?.note ?? "";
      for (const button of verdicts) button.setAttribute("aria-pressed", String(button.dataset.verdict === own?.verdict));
      const by = own ? `Marked as ${own.verdict}${own.reader ? ` by ${own.reader}` : ""}. ` : "";
      status.replaceChildren(
        `${by}A review never changes the result. A verdict saves the note as well.`,
        ...(own ? [el("button", { class: "link", text: "Withdraw", on: { click: () => this.withdraw() } })] : []),
      );
      others.hidden = foreign.length === 0;
      others.replaceChildren(
        el("p", { text: "Other readers, the newest verdict first:" }),
        el("ul", {}, ...foreign.map((review) => el("li", { text: reviewInWords(review) }))),
      );
    };
    showReviews();
    return el(
      "div", { class: "review" },
      el("div", { class: "verdicts", role: "group", "aria-label": `Review of finding ${finding.label}` }, ...verdicts),
      el("label", {}, "Note (no names of patients)", note),
      getSession().login === "none" ? this._readerField(showReviews) : null,
      status,
      others,
      el("p", { id: "review-fault", class: "fault", role: "alert" }),
    );
  }

  /** The name of the reader. Another name shows other reviews, in the same form: a new form would lose the focus. */
  _readerField(onChange) {
    const keep = (event) => {
      sessionStorage.setItem(READER_KEY, event.target.value.trim());
      onChange();
    };
    const field = el("input", { id: "review-reader", maxlength: "64", autocomplete: "off", on: { input: keep } });
    field.value = sessionStorage.getItem(READER_KEY) ?? "";
    return el("label", {}, "Reader (optional)", field);
  }
}
