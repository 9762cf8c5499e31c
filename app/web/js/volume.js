// Sampling of NIfTI volumes on axial planes, without a canvas or WebGL. Positions are RAS+ millimetres.

import { NVImage } from "../vendor/niivue.js";

// Percentiles of the voxels that are not zero.
const ROBUST = [0.01, 0.998];
const SAMPLES = 200_000;

/** A volume whose values can be read at any position. */
export class Volume {
  constructor(image) {
    this._values = image.img;
    const { hdr } = image;
    [, this._nx, this._ny, this._nz] = hdr.dims;
    this._slope = hdr.scl_slope || 1;
    this._intercept = hdr.scl_inter || 0;
    this._affine = hdr.affine;
    this._inverse = invertAffine(hdr.affine);
    this.window = robustWindow(image);
  }

  static async read(buffer, name) {
    return new Volume(await NVImage.loadFromUrl({ url: name, name, buffer }));
  }

  /** Return the box of the bright voxels in RAS+ mm: [[x, y, z], [x, y, z]]. */
  get content() {
    const low = [Infinity, Infinity, Infinity];
    const high = [-Infinity, -Infinity, -Infinity];
    const threshold = (this.window[0] + 0.1 * (this.window[1] - this.window[0]) - this._intercept) / this._slope;
    const step = Math.max(1, Math.floor(Math.cbrt(this._values.length / SAMPLES)));
    for (let k = 0; k < this._nz; k += step) {
      for (let j = 0; j < this._ny; j += step) {
        for (let i = 0; i < this._nx; i += step) {
          if (!(this._values[i + this._nx * (j + this._ny * k)] > threshold)) continue;
          applyAffine(this._affine, [i, j, k]).forEach((value, axis) => {
            low[axis] = Math.min(low[axis], value);
            high[axis] = Math.max(high[axis], value);
          });
        }
      }
    }
    return [low, high];
  }

  /** Return the value of the nearest voxel, or NaN outside. */
  at(x, y, z) {
    const [i, j, k] = applyAffine(this._inverse, [x, y, z]).map(Math.round);
    if (i < 0 || j < 0 || k < 0 || i >= this._nx || j >= this._ny || k >= this._nz) return NaN;
    return this._values[i + this._nx * (j + this._ny * k)] * this._slope + this._intercept;
  }

  /** Sample an axial plane in radiological layout: rows go from anterior to posterior, columns from the patient's right to left. */
  plane(z, { left, top, spacing, columns, rows }) {
    const values = new Float32Array(columns * rows);
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        // In RAS+, x grows towards the patient's right, which is on the left of the picture.
        values[row * columns + column] = this.at(left - column * spacing, top - row * spacing, z);
      }
    }
    return values;
  }
}

/** Return a window without the few brightest voxels, in the units of the scan. */
export function robustWindow({ img, hdr }) {
  const step = Math.max(1, Math.floor(img.length / SAMPLES));
  const values = [];
  for (let index = 0; index < img.length; index += step) if (img[index] !== 0 && Number.isFinite(img[index])) values.push(img[index]);
  values.sort((a, b) => a - b);
  const [low, high] = ROBUST.map((share) => (values[Math.floor(share * (values.length - 1))] ?? 0) * (hdr.scl_slope || 1) + (hdr.scl_inter || 0));
  return [Math.min(0, low), high];
}

function applyAffine(m, [x, y, z]) {
  return [0, 1, 2].map((row) => m[row][0] * x + m[row][1] * y + m[row][2] * z + m[row][3]);
}

function invertAffine(m) {
  const [[a, b, c], [d, e, f], [g, h, i]] = m;
  const determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g);
  const inverse = [
    [e * i - f * h, c * h - b * i, b * f - c * e],
    [f * g - d * i, a * i - c * g, c * d - a * f],
    [d * h - e * g, b * g - a * h, a * e - b * d],
  ].map((row) => row.map((value) => value / determinant));
  const shift = inverse.map((row) => -(row[0] * m[0][3] + row[1] * m[1][3] + row[2] * m[2][3]));
  return inverse.map((row, index) => [...row, shift[index]]);
}
