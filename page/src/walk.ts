/** Steps of the keyboard from node to node. */

import type { GraphModel } from "./model";
import type { Layout } from "./layout";

export type Step = "up" | "down" | "left" | "right";

/** The next node: up and down along the strongest edge, left and right along the row; -1 if there is none. */
export function nextNode(model: GraphModel, layout: Layout, from: number, step: Step): number {
  if (from < 0) return firstNode(model, layout);
  const { source, target } = model.view.edges;
  const drawn = (node: number): boolean => layout.w[node]! > 0;
  if (step === "up") return Array.from(model.edgesOutOf(from), (edge) => target[edge]!).find(drawn) ?? -1;
  if (step === "down") return Array.from(model.edgesInto(from), (edge) => source[edge]!).find(drawn) ?? -1;
  const row = rowNodes(model, layout, from);
  const place = row.indexOf(from) + (step === "right" ? 1 : -1);
  return row[place] ?? -1;
}

/** Where a walk begins: the target with the greatest weight. */
function firstNode(model: GraphModel, layout: Layout): number {
  const nodes = model.view.nodes;
  const targets = nodes.flatMap((node, i) => (node.kind === "target" && layout.w[i]! > 0 ? [i] : []));
  return targets.sort((a, b) => (nodes[b]!.weight ?? 0) - (nodes[a]!.weight ?? 0))[0] ?? -1;
}

function rowNodes(model: GraphModel, layout: Layout, from: number): number[] {
  const nodes = model.view.nodes;
  const inRow = (i: number): boolean => {
    const a = nodes[i]!;
    const b = nodes[from]!;
    const rowed = a.kind === "feature" || a.kind === "error";
    return rowed === (b.kind === "feature" || b.kind === "error") && (rowed ? a.layer === b.layer : a.kind === b.kind);
  };
  const row = nodes.flatMap((_, i) => (layout.w[i]! > 0 && inRow(i) ? [i] : []));
  return row.sort((a, b) => layout.x[a]! - layout.x[b]! || layout.y[a]! - layout.y[b]!);
}
