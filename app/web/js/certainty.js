// How sure the program is, in words. One rule for the viewer and the print page.

// A finding exists if its peak is above the threshold. Healthy scans have findings just above it as well, because the
// threshold allows a median of 1 ml in healthy validation scans. This factor is a rule of display and was not validated.
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

/** Return how the scan as a whole compares with the healthy scans that the model knows. */
export function scanInWords(scores) {
  const { scan, healthy_scan: healthy } = scores;
  const range = `healthy scans have ${healthy.low.toFixed(2)} to ${healthy.high.toFixed(2)}`;
  if (scan > 2 * healthy.high) return `Far outside: its score is ${scan.toFixed(2)}, ${range}. Do not rely on the findings.`;
  if (scan > healthy.high) return `Above the healthy range: its score is ${scan.toFixed(2)}, ${range}. A large lesion or another scanner can be the cause.`;
  if (scan < healthy.low) return `Below the healthy range: its score is ${scan.toFixed(2)}, ${range}. A smoothed image can be the cause.`;
  return `Within the healthy range: its score is ${scan.toFixed(2)}, ${range}.`;
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
