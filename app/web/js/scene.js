// One picture of a scan: a NiiVue canvas with overlays, and the annotations above it.

import { DRAG_MODE, NVImage, Niivue, SHOW_RENDER, SLICE_TYPE } from "../vendor/niivue.js";
import { annotate } from "./annotations.js";

export const VIEWS = {
  multi: SLICE_TYPE.MULTIPLANAR,
  axial: SLICE_TYPE.AXIAL,
  coronal: SLICE_TYPE.CORONAL,
  sagittal: SLICE_TYPE.SAGITTAL,
  render: SLICE_TYPE.RENDER,
};

// The drawing layer shows the mask. Its values are the numbers of the findings; all numbers above are drawn as this one.
const LAST_LABEL = 255;
const COLOURS = { clear: [255, 92, 80], doubtful: [255, 214, 10], selected: [120, 220, 255] };

const OPTIONS = {
  dragAndDropEnabled: false,
  viewModeHotKey: "",
  clipPlaneHotKey: "",
  cycleClipPlaneHotKey: "",
  logLevel: "error",
  loadingText: "",
  backColor: [0, 0, 0, 1],
  crosshairColor: [0.42, 0.71, 1, 0.7],
  crosshairWidth: 0.6,
  crosshairGap: 6,
  fontColor: [0.75, 0.8, 0.85, 1],
  isRadiologicalConvention: true,
  sagittalNoseLeft: true,
  showAllOrientationMarkers: true,
  dragMode: DRAG_MODE.windowing,
  multiplanarShowRender: SHOW_RENDER.ALWAYS,
  multiplanarForceRender: true,
  multiplanarPadPixels: 6,
  show3Dcrosshair: true,
};

/** Read a NIfTI file. It needs no canvas. */
export function readNifti(buffer, name, options = {}) {
  return NVImage.loadFromUrl({ url: name, name, buffer, ...options });
}

export const hasWebGl2 = () => Boolean(document.createElement("canvas").getContext("webgl2"));

/** A canvas with its volumes. Positions are RAS+ millimetres. */
export class Scene {
  constructor(container, label) {
    this.container = container;
    this.canvas = container.querySelector("canvas.picture");
    this.canvas.setAttribute("aria-label", label);
    this._notes = container.querySelector("canvas.notes");
    this.annotations = { findings: [], isOn: true };
    this.followers = new Set();
    this.onMove = () => {};
    this.onWindow = () => {};
  }

  async start() {
    this.nv = new Niivue(OPTIONS);
    // The viewer has its own keys. NiiVue's would move the crosshair as well.
    this.container.addEventListener("keydown", (event) => event.stopPropagation(), true);
    await this.nv.attachToCanvas(this.canvas);
    this.nv.onLocationChange = () => this.onMove();
    this.nv.onIntensityChange = () => this.onWindow();
    const draw = this.nv.drawScene.bind(this.nv);
    this.nv.drawScene = () => {
      draw();
      annotate(this._notes, this.nv, this.annotations);
      for (const follower of this.followers) follower.copyViewOf(this);
    };
    return this;
  }

  setBase(image) {
    this.nv.addVolume(image);
  }

  /** Replace the map, an overlay that is transparent below its threshold. */
  setMap(image) {
    if (this.map) this.nv.removeVolume(this.map);
    this.map = image;
    if (image) this.nv.addVolume(image);
  }

  setMapThreshold(threshold) {
    if (!this.map) return;
    this.map.cal_min = threshold;
    this.nv.refreshLayers(this.map, 1);
    this.redraw();
  }

  setMapOpacity(opacity) {
    this.nv.overlayAlphaShader = opacity;
    if (this.map) this.map.opacity = opacity > 0 ? 1 : 0;
    this.redraw();
  }

  /** Show the findings of a label image. */
  setMask(labels) {
    const values = labels.img instanceof Uint8Array ? labels.img : Uint8Array.from(labels.img, (label) => Math.min(label, LAST_LABEL));
    this.nv.loadDrawing({ hdr: labels.hdr, permRAS: labels.permRAS, img: values });
  }

  /** Colour the mask: clear, doubtful and selected findings. The numbers above the picture repeat this with signs. */
  colourMask(findings) {
    const { lut } = this.nv.drawLut;
    for (const { label, isDoubtful, isSelected } of findings) {
      const colour = isSelected ? COLOURS.selected : isDoubtful ? COLOURS.doubtful : COLOURS.clear;
      lut.set([...colour, 255], 4 * Math.min(label, LAST_LABEL));
    }
    this.nv.refreshColormaps();
    this.redraw();
  }

  /** Draw the mask as outline (rim) and fill, with an opacity from 0 to 1 each. */
  setMaskStyle({ outline, fill }) {
    this.nv.drawRimOpacity = outline;
    // The shader skips voxels whose opacity is zero, and with them the rim.
    this.nv.drawOpacity = Math.max(fill, outline > 0 ? 0.004 : 0);
    this.redraw();
  }

  setWindow(low, high) {
    const [base] = this.nv.volumes;
    base.cal_min = low;
    base.cal_max = high;
    this.nv.refreshLayers(base, 0);
    this.redraw();
  }

  get window() {
    const [base] = this.nv.volumes;
    return [base.cal_min, base.cal_max];
  }

  setView(name) {
    this.nv.setSliceType(VIEWS[name]);
  }

  setRadiological(isRadiological) {
    this.nv.setRadiologicalConvention(isRadiological);
  }

  get positionMm() {
    return [...this.nv.frac2mm(this.nv.scene.crosshairPos, 0, true)].slice(0, 3);
  }

  moveTo(mm) {
    this.nv.scene.crosshairPos = this.nv.mm2frac(mm, 0, true);
    this._moved();
  }

  get shape() {
    return this.nv.volumes[0].dimsRAS.slice(1, 4);
  }

  /** The voxel of the crosshair along the RAS+ axes of the scan's grid. */
  get voxel() {
    return [...this.nv.frac2vox(this.nv.scene.crosshairPos)];
  }

  moveToSlice(axis, index) {
    this.nv.scene.crosshairPos[axis] = (index + 0.5) / this.shape[axis];
    this._moved();
  }

  /** Return the value of a volume at the crosshair. */
  valueOf(image) {
    const [x, y, z] = image.mm2vox(this.positionMm);
    return image.getValue(x, y, z);
  }

  copyViewOf(other) {
    const [mine, theirs] = [this.nv.scene, other.nv.scene];
    const state = JSON.stringify([[...theirs.crosshairPos], [...theirs.pan2Dxyzmm], theirs.renderAzimuth, theirs.renderElevation, theirs.volScaleMultiplier]);
    if (state === this._copied && this.nv.opts.sliceType === other.nv.opts.sliceType) return;
    this._copied = state;
    this.nv.opts.sliceType = other.nv.opts.sliceType;
    mine.crosshairPos = [...theirs.crosshairPos];
    mine.pan2Dxyzmm = [...theirs.pan2Dxyzmm];
    for (const name of ["renderAzimuth", "renderElevation", "volScaleMultiplier"]) mine[name] = theirs[name];
    // The other direction must not start again.
    other._copied = state;
    this.redraw();
  }

  /** Draw once before the next frame, however often this is called. */
  redraw() {
    this._frame ??= requestAnimationFrame(() => {
      this._frame = undefined;
      this.nv.drawScene();
    });
  }

  _moved() {
    this.nv.createOnLocationChange();
    this.redraw();
  }
}
