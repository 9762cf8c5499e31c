// Controls of mask, map and window. Each acts at once on all scenes.

import { byId, el } from "./dom.js";
import { robustWindow } from "./volume.js";

// Width and level in Hounsfield units.
const CT_PRESETS = [["brain", 80, 40], ["subdural", 200, 75], ["stroke", 40, 40], ["bone", 2800, 600]];
const MASK_STYLES = ["outline", "fill", "off"];
// Upper end of the colour scale, as a multiple of the threshold of a finding. preview.png has the same scale.
export const SCALE_FACTOR = 3;

/** The controls. `scenes` is the live list of scenes. */
export class Layers {
  constructor(scenes) {
    this._scenes = scenes;
    for (const input of document.querySelectorAll("input[name=mask]")) input.addEventListener("change", () => this._applyMask());
    byId("mask-opacity").addEventListener("input", () => this._applyMask());
    byId("map-opacity").addEventListener("input", () => this._applyMapOpacity());
    byId("map-threshold").addEventListener("input", () => this._applyThreshold());
    byId("preset").addEventListener("change", () => this._applyPreset());
    for (const id of ["level", "width"]) byId(id).addEventListener("change", () => this._applyNumbers());
  }

  /** Describe the thresholds of one result. */
  setReport(report) {
    this._report = report;
    this.setMapScale("anomaly");
    byId("thresholds").textContent =
      `A finding has a peak above ${report.threshold} and extends to ${report.extent_threshold}. The sliders change the display, never the result.`;
  }

  /** Set the colour scale and the threshold of a map. That of the anomaly map follows from the thresholds. */
  setMapScale(name, image = null) {
    const isAnomaly = name === "anomaly";
    const { threshold, extent_threshold: extent } = this._report;
    this.scaleMax = isAnomaly ? SCALE_FACTOR * threshold : image.global_max;
    const slider = byId("map-threshold");
    slider.max = String(this.scaleMax);
    slider.step = String(this.scaleMax / 100);
    slider.value = String(isAnomaly ? extent : 0);
    byId("bar-low").textContent = "0";
    byId("bar-high").textContent = this.scaleMax.toFixed(2);
    byId("colour-bar").classList.toggle("uncertainty", !isAnomaly);
  }

  get mapThreshold() {
    return Number(byId("map-threshold").value);
  }

  /** Offer the presets for the modality of the base image, and return the first window. */
  setBase(base, isCt) {
    const options = isCt ? CT_PRESETS.map(([name, width, level]) => [`CT ${name} (W ${width}, L ${level})`, level - width / 2, level + width / 2]) : [];
    options.push(["robust range", ...robustWindow(base)], ["full range", base.global_min, base.global_max]);
    this._presets = options;
    byId("preset").replaceChildren(...options.map(([name], index) => el("option", { value: String(index), text: name })), el("option", { value: "own", text: "own", hidden: true }));
    this._applyPreset();
    return [this._low, this._high];
  }

  get window() {
    return [this._low, this._high];
  }

  nextMaskStyle() {
    const current = document.querySelector("input[name=mask]:checked").value;
    const following = MASK_STYLES[(MASK_STYLES.indexOf(current) + 1) % MASK_STYLES.length];
    document.querySelector(`input[name=mask][value=${following}]`).checked = true;
    this._applyMask();
  }

  toggleMap() {
    this._showMap(Number(byId("map-opacity").value) === 0);
  }

  /** Hide the map, or show it again if this hid it. */
  hideMap(isHidden) {
    const isShown = Number(byId("map-opacity").value) > 0;
    if (isHidden && isShown) this._isHiddenHere = true;
    if (isHidden) this._showMap(false);
    else if (this._isHiddenHere) {
      this._isHiddenHere = false;
      this._showMap(true);
    }
  }

  _showMap(isShown) {
    const slider = byId("map-opacity");
    if (Number(slider.value) > 0) this._lastOpacity = slider.value;
    slider.value = isShown ? (this._lastOpacity ?? "0.4") : "0";
    this._applyMapOpacity();
  }

  /** Apply all controls to every scene, for example to a new one. */
  apply() {
    this._applyMask();
    this._applyMapOpacity();
    this._applyThreshold();
    if (this._presets) this._applyWindow();
  }

  /** Show a window that was changed by dragging in a scene. */
  showWindow(scene) {
    const [low, high] = scene.window;
    [this._low, this._high] = [low, high];
    byId("preset").value = "own";
    this._writeNumbers();
    for (const other of this._scenes) if (other !== scene) other.setWindow(low, high);
  }

  _applyMask() {
    const style = document.querySelector("input[name=mask]:checked").value;
    const opacity = Number(byId("mask-opacity").value);
    byId("mask-opacity-at").value = `${Math.round(opacity * 100)} %`;
    const outline = style === "off" ? 0 : opacity;
    const fill = style === "fill" ? opacity / 2 : 0;
    for (const scene of this._scenes) {
      scene.setMaskStyle({ outline, fill });
    }
  }

  _applyMapOpacity() {
    const opacity = Number(byId("map-opacity").value);
    byId("map-opacity-at").value = `${Math.round(opacity * 100)} %`;
    for (const scene of this._scenes) scene.setMapOpacity(opacity);
  }

  _applyThreshold() {
    byId("map-threshold-at").value = this.mapThreshold.toFixed(3);
    for (const scene of this._scenes) scene.setMapThreshold(this.mapThreshold);
  }

  _applyPreset() {
    const [, low, high] = this._presets[Number(byId("preset").value)];
    [this._low, this._high] = [low, high];
    this._writeNumbers();
    this._applyWindow();
  }

  _applyNumbers() {
    const [level, width] = [Number(byId("level").value), Number(byId("width").value)];
    if (!(width > 0)) return;
    [this._low, this._high] = [level - width / 2, level + width / 2];
    byId("preset").value = "own";
    this._applyWindow();
  }

  _writeNumbers() {
    const digits = this._high - this._low > 20 ? 0 : 3;
    byId("level").value = ((this._low + this._high) / 2).toFixed(digits);
    byId("width").value = (this._high - this._low).toFixed(digits);
  }

  _applyWindow() {
    for (const scene of this._scenes) scene.setWindow(this._low, this._high);
  }
}
