/** The strongest paths between two nodes: the greatest products of shares along edges. */

import type { GraphModel } from "./model";
import type { StrongPath } from "./types";

interface Partial {
  strength: number;
  /** Edges from the target back to the present node. */
  edges: number[];
  node: number;
}

const MOST_STEPS = 20000;

/** Search backwards from the target, the strongest partial path first; a share is at most 1, so none grows. */
export function strongestPaths(model: GraphModel, from: string, to: string, count: number): StrongPath[] {
  const start = model.byId.get(from);
  const end = model.byId.get(to);
  if (start === undefined || end === undefined) return [];
  const { source, share } = model.view.edges;
  const queue: Partial[] = [{ strength: 1, edges: [], node: end }];
  const results: StrongPath[] = [];
  const visits = new Map<number, number>();
  for (let step = 0; step < MOST_STEPS && queue.length > 0 && results.length < count; step++) {
    const path = popStrongest(queue);
    const seen = (visits.get(path.node) ?? 0) + 1;
    visits.set(path.node, seen);
    if (path.node === start && path.edges.length > 0) results.push(describe(model, path));
    else if (seen <= count)
      for (const edge of model.edgesInto(path.node))
        pushPath(queue, { strength: path.strength * share[edge]!, edges: [...path.edges, edge], node: source[edge]! });
  }
  return results;
}

function describe(model: GraphModel, path: Partial): StrongPath {
  const { source, target, weight } = model.view.edges;
  const edges = [...path.edges].reverse();
  const nodes = [source[edges[0]!]!, ...edges.map((edge) => target[edge]!)];
  const weights = edges.map((edge) => weight[edge]!);
  return {
    nodes: nodes.map((node) => model.view.nodes[node]!),
    weights,
    strength: path.strength,
    sign: weights.reduce((sign, value) => sign * Math.sign(value), 1),
  };
}

/** A binary heap with the strongest path at its root. */
function pushPath(heap: Partial[], path: Partial): void {
  heap.push(path);
  let i = heap.length - 1;
  while (i > 0) {
    const parent = (i - 1) >> 1;
    if (heap[parent]!.strength >= heap[i]!.strength) return;
    [heap[parent], heap[i]] = [heap[i]!, heap[parent]!];
    i = parent;
  }
}

function popStrongest(heap: Partial[]): Partial {
  const top = heap[0]!;
  const last = heap.pop()!;
  if (heap.length === 0) return top;
  heap[0] = last;
  let i = 0;
  for (;;) {
    const left = 2 * i + 1;
    let best = i;
    if (left < heap.length && heap[left]!.strength > heap[best]!.strength) best = left;
    if (left + 1 < heap.length && heap[left + 1]!.strength > heap[best]!.strength) best = left + 1;
    if (best === i) return top;
    [heap[best], heap[i]] = [heap[i]!, heap[best]!];
    i = best;
  }
}
