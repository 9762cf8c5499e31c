// The healthy counterpart beside, over or in alternation with the scan.

import { announce, byId } from "./dom.js";

const FLICKER_MILLISECONDS = 700;

/**
 * Controls of the comparison. `open` returns the scene of the counterpart and is called once. `hideMap(isHidden)` takes
 * the map away where scan and counterpart are drawn at the same place: it would be the largest difference.
 */
export class Comparison {
  constructor(scan, open, hideMap) {
    this._scan = scan;
    this._open = open;
    this._hideMap = hideMap;
    this._stage = byId("stage");
    this.mode = "off";
    byId("swipe").addEventListener("input", () => this._clip());
    for (const input of document.querySelectorAll("input[name=compare]")) {
      input.addEventListener("change", () => this.set(input.value));
    }
  }

  toggle(mode) {
    this.set(this.mode === mode ? "off" : mode);
  }

  async set(mode) {
    this.mode = mode;
    document.querySelector(`input[name=compare][value=${mode}]`).checked = true;
    clearInterval(this._timer);
    if (mode !== "off") await (this._ready ??= this._link());
    if (this.mode !== mode) return; // another mode was chosen while the counterpart was loading
    this._stage.dataset.compare = mode;
    byId("counterpart-scene").hidden = mode === "off";
    byId("swipe-row").hidden = mode !== "swipe";
    this._clip();
    this._show("scan");
    this._hideMap(mode === "swipe" || mode === "flicker");
    if (mode === "flicker") this._flicker();
    this._scan.redraw();
    this.counterpart?.redraw();
  }

  async _link() {
    byId("counterpart-scene").hidden = false;
    this.counterpart = await this._open();
    this._scan.followers.add(this.counterpart);
    this.counterpart.followers.add(this._scan);
    this.counterpart.copyViewOf(this._scan);
  }

  _flicker() {
    const alternate = () => this._show(this._stage.dataset.shown === "scan" ? "counterpart" : "scan");
    this.step = alternate;
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
      announce("Press space to switch between scan and counterpart.");
      return;
    }
    this._timer = setInterval(alternate, FLICKER_MILLISECONDS);
  }

  _show(name) {
    this._stage.dataset.shown = name;
  }

  _clip() {
    const share = this.mode === "swipe" ? Number(byId("swipe").value) : 0;
    this._stage.style.setProperty("--swipe", `${share}%`);
  }
}
