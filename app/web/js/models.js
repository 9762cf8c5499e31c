// The model page: installed bundles, their limits and cards.

import { getJson } from "./api.js";
import { byId, el, problemCard } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { startPage } from "./page.js";

const chosen = () => decodeURIComponent(location.hash.slice(1));

function renderList(models) {
  const current = chosen() || models[0]?.id;
  byId("model-list").replaceChildren(...models.map((model) => el(
    "li", {},
    el(
      "a", { href: `${location.pathname}#${encodeURIComponent(model.id)}`, "aria-current": model.id === current ? "true" : null },
      el("strong", { text: model.id }),
      `${model.modality} ${model.sequence}`,
      el("br"),
      el("span", { class: "quiet", text: model.title }),
    ),
  )));
  return models.find((model) => model.id === current) ?? models[0];
}

function facts(model, manifest) {
  const { residual, calibration } = manifest;
  const range = ({ low, high }) => `${low.toPrecision(3)} to ${high.toPrecision(3)}`;
  const rows = [
    ["Intended use", model.intended_use],
    ["Threshold of a finding", `${residual?.threshold ?? "–"}, extent ${residual?.extent_threshold ?? "–"}`],
    ["Score of healthy scans", calibration?.scan_score ? range(calibration.scan_score) : "–"],
    ["Licence", model.licence],
  ];
  return el("dl", { class: "facts" }, ...rows.flatMap(([name, text]) => [el("dt", { text: name }), el("dd", { text })]));
}

/** Return a table of the site profiles of a model, or a sentence if there are none. */
function renderProfiles(profiles) {
  if (profiles.length === 0) {
    return el("p", { text: "No site profile is loaded for this model. Its thresholds hold only for scanners like those of the training data." });
  }
  const head = ["Scanner", "Healthy scans", "Target", "Threshold", "False findings: median, 90th percentile", "Made on"];
  const cells = (profile) => [
    profile.scanner ? `${profile.scanner.manufacturer} ${profile.scanner.model}` : "not stated in the files",
    `${profile.scans}`,
    `${profile.target_ml} ml`,
    `${profile.threshold.toPrecision(3)}, extent ${profile.extent_threshold.toPrecision(3)}`,
    `${profile.achieved.median} ml, ${profile.achieved.percentile_90} ml`,
    profile.created.slice(0, 10),
  ];
  return el(
    "table", {},
    el("caption", { text: "Site profiles: they replace the thresholds for scans of their scanner" }),
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col", text })))),
    el("tbody", {}, ...profiles.map((profile) => el("tr", {}, ...cells(profile).map((text) => el("td", { text }))))),
  );
}

async function show(models) {
  const model = renderList(models);
  if (!model) {
    byId("card").replaceChildren(el("p", { text: "No model is installed." }));
    return;
  }
  document.title = `${model.id} – Counterpart`;
  const { manifest, card, site_profiles: profiles } = await getJson(model.link);
  byId("card").replaceChildren(
    ...(card ? renderMarkdown(card) : [el("h2", { text: model.id }), el("p", { text: "This bundle has no card." })]),
    el("h3", { text: "In the service" }),
    facts(model, manifest),
    renderProfiles(profiles),
  );
}

async function start() {
  const ready = startPage();
  try {
    const { models } = await getJson("v1/models");
    addEventListener("hashchange", () => show(models));
    await show(models);
  } catch (error) {
    byId("card").replaceChildren(problemCard(error.problem ?? { title: error.message }));
  }
  await ready;
}

start();
