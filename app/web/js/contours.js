// Outlines of the findings on one plane of a label bitmap.

/**
 * Trace the outlines of all labels on a plane.
 *
 * `at(a, b)` is the label of the pixel (a, b). Returns [{label, loops}], where a loop is a closed list of pixel corners
 * [a, b]: the pixel (a, b) covers a to a + 1 and b to b + 1.
 */
export function traceOutlines(at, columns, rows) {
  const edges = new Map(); // label -> Map from the start of an edge to the ends that follow it
  const key = (a, b) => b * (columns + 1) + a;
  const add = (label, start, end) => {
    if (!edges.has(label)) edges.set(label, new Map());
    const starts = edges.get(label);
    if (starts.has(start)) starts.get(start).push(end);
    else starts.set(start, [end]);
  };
  const differs = (label, a, b) => a < 0 || b < 0 || a >= columns || b >= rows || at(a, b) !== label;
  for (let b = 0; b < rows; b += 1) {
    for (let a = 0; a < columns; a += 1) {
      const label = at(a, b);
      if (label === 0) continue;
      // The pixel is on the left of each edge, so that the edges of one outline follow each other.
      if (differs(label, a, b - 1)) add(label, key(a, b), key(a + 1, b));
      if (differs(label, a + 1, b)) add(label, key(a + 1, b), key(a + 1, b + 1));
      if (differs(label, a, b + 1)) add(label, key(a + 1, b + 1), key(a, b + 1));
      if (differs(label, a - 1, b)) add(label, key(a, b + 1), key(a, b));
    }
  }
  const toCorner = (point) => [point % (columns + 1), Math.floor(point / (columns + 1))];
  return [...edges].map(([label, starts]) => ({ label, loops: joinEdges(starts).map((loop) => loop.map(toCorner)) }));
}

function joinEdges(starts) {
  const loops = [];
  for (const [start, ends] of starts) {
    while (ends.length) {
      const loop = [start];
      let point = ends.pop();
      while (point !== start) {
        loop.push(point);
        point = starts.get(point).pop();
      }
      loops.push(loop);
    }
  }
  return loops;
}
