// A renderer for the Markdown of model cards: headings, paragraphs, lists, tables, bold, code. It builds DOM nodes,
// so a card cannot bring markup or scripts with it. Anything else stays text. Links are shown as text with their
// target, because a card's targets are files of the repository.

import { el } from "./dom.js";

/** Return the nodes of a Markdown text. Headings begin at `level`. */
export function renderMarkdown(text, level = 2) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const nodes = [];
  while (lines.length) {
    if (!lines[0].trim()) lines.shift();
    else nodes.push(takeBlock(lines, level));
  }
  return nodes;
}

function takeBlock(lines, level) {
  const heading = lines[0].match(/^(#{1,6})\s+(.*)$/);
  if (heading) {
    lines.shift();
    return el(`h${Math.min(6, heading[1].length + level - 1)}`, {}, ...renderInline(heading[2]));
  }
  if (lines[0].startsWith("|")) return takeTable(lines);
  if (isItem(lines[0])) return takeList(lines);
  return el("p", {}, ...renderInline(takeWhile(lines, (line) => line.trim() && !/^(#{1,6}\s|\|)/.test(line) && !isItem(line)).join(" ")));
}

const isItem = (line) => /^\s*([-*]|\d+\.)\s+/.test(line);

function takeWhile(lines, test) {
  const taken = [lines.shift()];
  while (lines.length && test(lines[0])) taken.push(lines.shift());
  return taken;
}

function takeList(lines) {
  const tag = /^\s*\d+\./.test(lines[0]) ? "ol" : "ul";
  const items = [];
  for (const line of takeWhile(lines, (following) => isItem(following) || /^\s+\S/.test(following))) {
    if (isItem(line)) items.push(line.replace(/^\s*([-*]|\d+\.)\s+/, ""));
    else items[items.length - 1] += ` ${line.trim()}`;
  }
  return el(tag, {}, ...items.map((item) => el("li", {}, ...renderInline(item))));
}

function takeTable(lines) {
  const rows = takeWhile(lines, (line) => line.startsWith("|")).map((line) => line.replace(/^\||\|\s*$/g, "").split("|").map((cell) => cell.trim()));
  const [head, , ...body] = rows;
  const row = (cells, tag) => el("tr", {}, ...cells.map((cell) => el(tag, tag === "th" ? { scope: "col" } : {}, ...renderInline(cell))));
  const hasHead = head.some(Boolean);
  return el("table", {}, hasHead ? el("thead", {}, row(head, "th")) : null, el("tbody", {}, ...body.map((cells) => row(cells, "td"))));
}

function renderInline(text) {
  const nodes = [];
  const pattern = /\*\*(.+?)\*\*|`([^`]+)`|\[([^\]]+)\]\(([^)\s]+)\)/g;
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    nodes.push(text.slice(end, match.index));
    const [whole, bold, code, label, target] = match;
    if (bold) nodes.push(el("strong", {}, ...renderInline(bold)));
    else if (code) nodes.push(el("code", { text: code }));
    else nodes.push(label === target ? label : `${label} (${target})`);
    end = match.index + whole.length;
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}
