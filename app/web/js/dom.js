// Elements, numbers and times. Data enters the page as text nodes only, never as HTML.

/** Create an element. `properties`: class, text, on (object of listeners), anything else is an attribute. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "class") element.className = value;
    else if (name === "on") for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Return whether a key press belongs to a field in which a person types. */
export function isTyping(event) {
  const { target } = event;
  return target.matches?.("input:not([type=range], [type=checkbox], [type=radio]), textarea, select") ||
    event.ctrlKey || event.metaKey || event.altKey;
}

export function formatNumber(value, digits = 1) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

export function formatVolume(millilitres) {
  return millilitres === null || millilitres === undefined ? "–" : `${millilitres.toFixed(millilitres < 1 ? 2 : 1)} ml`;
}

export function formatPosition(mm, digits = 1) {
  return mm.map((value) => value.toFixed(digits).replace("-", "−").replace(/^−(0(\.0*)?)$/, "$1")).join(", ");
}

const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60]];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "always" });

/** Return the age of a moment in words. */
export function formatAge(moment) {
  const seconds = (Date.now() - new Date(moment)) / 1000;
  for (const [unit, length] of UNITS) if (seconds >= length) return relative.format(-Math.floor(seconds / length), unit);
  return "just now";
}

export function formatTime(moment) {
  return moment ? new Date(moment).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" }) : "–";
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** Announce a sentence to screen readers. */
export function announce(sentence) {
  const region = byId("announcer");
  if (region && region.textContent !== sentence) region.textContent = sentence;
}

/** Show a question and return whether the person agreed. Escape and "Keep" mean no. */
export function ask({ title, text, action }) {
  const dialog = el("dialog", { class: "question", "aria-labelledby": "question-title" });
  const form = el(
    "form", { method: "dialog" },
    el("h2", { id: "question-title", text: title }),
    el("p", { text }),
    el("menu", {}, el("button", { value: "no", text: "Keep" }), el("button", { value: "yes", class: "danger", text: action })),
  );
  dialog.append(form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes");
      dialog.remove();
    });
  });
}

/** Build a card with the parts of a problem: title, found, expected, advice, code. */
export function problemCard(problem, heading = problem.title) {
  const parts = [["Found", problem.found], ["Expected", problem.expected], ["What to do", problem.advice]];
  return el(
    "div", { class: "problem", role: "alert" },
    el("strong", { text: `✕ ${heading}` }),
    el("dl", {}, ...parts.filter(([, text]) => text).flatMap(([name, text]) => [el("dt", { text: name }), el("dd", { text })])),
    el("code", { text: problem.code ?? String(problem.status ?? "") }),
  );
}
