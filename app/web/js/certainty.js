// How sure the program is, in words. One rule for the viewer and the print page.

// A finding exists if its peak is above the threshold. Healthy scans have findings just above it as well, because the
// threshold allows a median of 1 ml (`ct`: 0.5 ml) in healthy validation scans. This factor is a rule of display and was
// not validated.
export const CLEAR_RATIO = 1.5;

export function peakRatio(finding, report) {
  return finding.peak_score / report.threshold;
}

export function isDoubtful(finding, report) {
  return peakRatio(finding, report) < CLEAR_RATIO;
}

/** Return the certainty of a finding in words. */
export function certaintyOf(finding, report) {
  const ratio = peakRatio(finding, report).toFixed(1);
  return isDoubtful(finding, report)
    ? `doubtful: its peak is only ${ratio} times the threshold`
    : `clear: its peak is ${ratio} times the threshold`;
}

/** Return how much brighter or darker a finding is than a reference, in words; empty in reports of earlier versions. */
export function differenceInWords(finding, report, reference = "") {
  const difference = finding.mean_difference ?? null;
  if (difference === null) return "";
  const unit = report.input.modality === "CT" ? " HU" : "";
  return `${difference > 0 ? "brighter" : "darker"}${reference} by ${Number(Math.abs(difference).toPrecision(2))}${unit}`;
}

/** Return the score of the scan with the range in which healthy scans are: those of the site profile, if there is one. */
export function scoreOf({ scores, model }) {
  const profile = model.site_profile;
  return profile
    ? { score: scores.scan, range: profile.scan_score, whose: "the scans of the site profile have" }
    : { score: scores.scan, range: scores.healthy_scan, whose: "healthy scans have" };
}

/** Return how the scan as a whole compares with the healthy scans that the model or the site profile knows. */
export function scanInWords(report) {
  const { score, range, whose } = scoreOf(report);
  const numbers = `its score is ${score.toFixed(2)}, ${whose} ${range.low.toFixed(2)} to ${range.high.toFixed(2)}`;
  if (score > 2 * range.high) return `Far outside: ${numbers}. Do not rely on the findings.`;
  if (score > range.high) return `Above the healthy range: ${numbers}. A large lesion or another scanner can be the cause.`;
  if (score < range.low) return `Below the healthy range: ${numbers}. A smoothed image can be the cause.`;
  return `Within the healthy range: ${numbers}.`;
}

/** Return the site profile that determined the thresholds, in words. */
export function profileInWords({ model: { site_profile: profile } }) {
  if (!profile) return "none: thresholds of the training scanners";
  const doubt = profile.other_scanner ? ", made for another scanner" : "";
  return `${profile.id}: ${profile.scans} healthy scans, at most ${profile.target_ml} ml of false findings${doubt}`;
}

/** Return the warnings and notes of a result, each once: [{text, isWarning}]. */
export function collectWarnings(report) {
  const warnings = [...(report.warnings ?? [])];
  const selection = report.model.selection?.warning;
  if (selection && !warnings.some((text) => text.includes(selection))) warnings.push(selection);
  const notes = [...report.input.notes, leftOut(report.analysed)].filter(Boolean);
  return [...warnings.map((text) => ({ text, isWarning: true })), ...notes.map((text) => ({ text, isWarning: false }))];
}

/** Return a note if slices between analysed slices are missing. The empty slices above and below a head are no news. */
function leftOut({ slices_not_analysed: missing, slices }) {
  const analysed = [...Array(slices).keys()].filter((index) => !missing.includes(index));
  const inside = missing.filter((index) => index > analysed[0] && index < analysed.at(-1));
  if (inside.length === 0) return null;
  return `${inside.length} slices inside the head were not analysed. The results have gaps there.`;
}
