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

// Three planes, the axial one largest: [view, left, top, width, height] as fractions of the canvas. 3D is a view of its
// own, because it is slow without a graphics processor.
const WIDE = [["axial", 0, 0, 0.62, 1], ["coronal", 0.63, 0, 0.37, 0.5], ["sagittal", 0.63, 0.5, 0.37, 0.5]];
const NARROW = [["axial", 0, 0, 1, 0.62], ["coronal", 0, 0.63, 0.5, 0.37], ["sagittal", 0.5, 0.63, 0.5, 0.37]];
const toLayout = (tiles) => tiles.map(([view, ...position]) => ({ sliceType: VIEWS[view], position }));

const OPTIONS = {
  dragAndDropEnabled: false,
  viewModeHotKey: "",
  clipPlaneHotKey: "",
  cycleClipPlaneHotKey: "",
  logLevel: "error",
  loadingText: "",
  backColor: [0, 0, 0, 1],
  crosshairColor: [0.42, 0.71, 1, 0.7],
  crosshairWidth: 0.3,
  crosshairGap: 6,
  fontColor: [0.75, 0.8, 0.85, 1],
  isRadiologicalConvention: true,
  sagittalNoseLeft: true,
  showAllOrientationMarkers: true,
  dragMode: DRAG_MODE.windowing,
  multiplanarShowRender: SHOW_RENDER.NEVER,
  multiplanarPadPixels: 6,
  show3Dcrosshair: true,
  gradientOrder: 0, // vendor.mjs: none
};

/** Read a NIfTI file. It needs no canvas. */
export function readNifti(buffer, name, options = {}) {
  return NVImage.loadFromUrl({ url: name, name, buffer, ...options });
}

export const hasWebGl2 = () => Boolean(document.createElement("canvas").getContext("webgl2"));

const OVERLAY_UNIT = 2; // texture unit of the map in the shaders of NiiVue

function bindOverlay(gl, texture) {
  gl.activeTexture(gl.TEXTURE0 + OVERLAY_UNIT);
  gl.bindTexture(gl.TEXTURE_3D, texture);
}

/** Return a texture of one transparent voxel. */
function emptyVolume(gl) {
  const texture = gl.createTexture();
  bindOverlay(gl, texture);
  gl.texParameteri(gl.TEXTURE_3D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_3D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  gl.texImage3D(gl.TEXTURE_3D, 0, gl.RGBA8, 1, 1, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
  return texture;
}

/** A canvas with its volumes. Positions are RAS+ millimetres. */
export class Scene {
  constructor(container, label) {
    this.container = container;
    this.canvas = container.querySelector("canvas.picture");
    this.canvas.setAttribute("aria-label", label);
    this._notes = container.querySelector("canvas.notes");
    this.annotations = { findings: [], outline: 1, cache: new Map() };
    this.view = "multi";
    this._refresh = new Set(); // layers whose textures are out of date
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
    this._drawSolidMaskIn3D();
    const draw = this.nv.drawScene.bind(this.nv);
    this.nv.drawScene = () => {
      this._arrange();
      draw();
      annotate(this._notes, this.nv, this.annotations);
      for (const follower of this.followers) follower.copyViewOf(this);
    };
    return this;
  }

  /** In 3D, show the findings themselves: the map would cover them with regions below the threshold of a finding. */
  _drawSolidMaskIn3D() {
    const { nv } = this;
    const draw = nv.draw3D.bind(nv);
    nv.draw3D = (...options) => {
      const { drawOpacity } = nv;
      nv.drawOpacity = this._solid ?? 0;
      bindOverlay(nv.gl, (this._noMap ??= emptyVolume(nv.gl)));
      const result = draw(...options);
      bindOverlay(nv.gl, nv.overlayTexture);
      nv.drawOpacity = drawOpacity;
      return result;
    };
  }

  setBase(image, [low, high]) {
    this.nv.addVolume(Object.assign(image, { cal_min: low, cal_max: high }));
  }

  /** Replace the map, an overlay that is transparent below its threshold. */
  setMap(image) {
    const { nv } = this;
    this.map = image;
    // Not with `addVolume`, which computes the textures of the scan again.
    nv.volumes = [nv.volumes[0], image];
    nv.overlays = [image];
    nv.refreshLayers(image, 1);
    this.redraw();
  }

  setMapThreshold(threshold) {
    if (!this.map || this.map.cal_min === threshold) return;
    this.map.cal_min = threshold;
    this._refresh.add(1);
    this.redraw();
  }

  setMapOpacity(opacity) {
    this.nv.overlayAlphaShader = opacity;
    this.redraw();
  }

  /** Show the findings of a label image. */
  setMask(labels) {
    const values = labels.img instanceof Uint8Array ? labels.img : Uint8Array.from(labels.img, (label) => Math.min(label, LAST_LABEL));
    this.annotations.cache.clear();
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

  /** Set the opacity of the outlines and of the fill, 0 to 1. In 3D, the mask is solid unless both are 0. */
  setMaskStyle({ outline, fill }) {
    this.annotations.outline = outline;
    this.nv.drawOpacity = fill;
    this._solid = Math.max(outline, fill) > 0 ? 1 : 0;
    this.redraw();
  }

  setWindow(low, high) {
    const [base] = this.nv.volumes;
    if (base.cal_min === low && base.cal_max === high) return;
    Object.assign(base, { cal_min: low, cal_max: high });
    this._refresh.add(0);
    this.redraw();
  }

  get window() {
    const [base] = this.nv.volumes;
    return [base.cal_min, base.cal_max];
  }

  setView(name) {
    this.view = name;
    this.nv.opts.sliceType = VIEWS[name];
    this.redraw();
  }

  _arrange() {
    const { clientWidth, clientHeight } = this.canvas;
    this.nv.customLayout = this.view === "multi" ? toLayout(clientWidth > clientHeight ? WIDE : NARROW) : null;
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
    if (state === this._copied && this.view === other.view) return;
    this._copied = state;
    this.setView(other.view);
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
      for (const layer of this._refresh) this.nv.refreshLayers(this.nv.volumes[layer], layer);
      this._refresh.clear();
      this.nv.drawScene();
    });
  }

  _moved() {
    this.nv.createOnLocationChange();
    this.redraw();
  }
}
