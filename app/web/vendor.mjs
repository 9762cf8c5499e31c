// Builds vendor/niivue.js and vendor/LICENSES.txt from the packages of package.json: `npm run vendor`.
import { build } from "esbuild";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";

const ENTRY = 'export { Niivue, NVImage, SLICE_TYPE, DRAG_MODE, SHOW_RENDER } from "@niivue/niivue";';

// Zarr images are not used here. Their decoders are 1.4 MB of WebAssembly, which the content security policy forbids.
const ZARR = 'const refuse = () => { throw new Error("Zarr is not supported."); };\n' +
  "export { refuse as FetchStore, refuse as get, refuse as open, refuse as root, refuse as slice };";
const withoutZarr = {
  name: "without-zarr",
  setup(bundler) {
    bundler.onResolve({ filter: /^zarrita$/ }, () => ({ path: "zarrita", namespace: "refused" }));
    bundler.onLoad({ filter: /.*/, namespace: "refused" }, () => ({ contents: ZARR, loader: "js" }));
  },
};

// NiiVue computes a gradient of every volume, which only its gradient lighting uses: most of the time and half of the
// graphics memory of a large volume. With this line, `gradientOrder: 0` leaves it out.
const GRADIENT = "function gradientGL(params) {";
const withoutGradient = {
  name: "without-gradient",
  setup(bundler) {
    bundler.onLoad({ filter: /@niivue\/niivue\/build\/niivue\/index\.js$/ }, ({ path }) => {
      const source = readFileSync(path, "utf8");
      if (source.split(GRADIENT).length !== 2) throw new Error("NiiVue changed: gradientGL was not found.");
      const contents = source.replace(GRADIENT, `${GRADIENT} if (params.gradientOrder === 0) return params.gradientTexture;`);
      return { contents, loader: "js" };
    });
  },
};

// The npm package of NiiVue contains no licence file. This is the one of its repository.
const NIIVUE_LICENCE = "vendor/niivue-LICENSE.txt";

const result = await build({
  stdin: { contents: ENTRY, resolveDir: "." },
  outfile: "vendor/niivue.js",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "none",
  logLevel: "warning",
  metafile: true,
  plugins: [withoutZarr, withoutGradient],
});

function packageFolder(input) {
  return input.match(/^node_modules\/(@[^/]+\/[^/]+|[^/]+)/)?.[0];
}

function licenceOf(folder) {
  const file = readdirSync(folder).find((name) => /^licen[cs]e/i.test(name));
  return readFileSync(file ? join(folder, file) : NIIVUE_LICENCE, "utf8").trim();
}

const folders = [...new Set(Object.keys(result.metafile.inputs).map(packageFolder).filter(Boolean))].sort();
const texts = folders.map((folder) => {
  const { name, version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  return `${name} ${version} (${license})\n\n${licenceOf(folder)}\n`;
});
writeFileSync("vendor/LICENSES.txt", `Packages in ${dirname("vendor/niivue.js")}/niivue.js\n\n${texts.join(`\n${"-".repeat(80)}\n\n`)}`);
