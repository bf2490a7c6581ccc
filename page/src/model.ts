/** A view with indices: nodes by id, and the edges of every node, strongest first. */

import type { Connection, GraphNode, View } from "./types";

export interface Filter {
  errors: boolean;
  tokens: boolean;
  positive: boolean;
  negative: boolean;
  density: number;
}

export const SHOW_ALL: Filter = { errors: true, tokens: true, positive: true, negative: true, density: 1 };

export class GraphModel {
  readonly view: View;
  readonly byId = new Map<string, number>();
  /** Edges sorted from the strongest share to the weakest. */
  readonly order: Uint32Array;
  /** Sum of the absolute weights of a node's row; NaN where no edge of the view tells it. */
  readonly mass: Float64Array;
  private readonly inputs: Uint32Array[];
  private readonly outputs: Uint32Array[];

  constructor(view: View) {
    this.view = view;
    view.nodes.forEach((node, index) => this.byId.set(node.id, index));
    const { source, target, weight, share } = view.edges;
    this.order = Uint32Array.from(share.keys()).sort((a, b) => share[b]! - share[a]!);
    this.mass = new Float64Array(view.nodes.length).fill(Number.NaN);
    for (const edge of this.order) {
      const node = target[edge]!;
      if (Number.isNaN(this.mass[node]!) && share[edge]! > 0) this.mass[node] = Math.abs(weight[edge]!) / share[edge]!;
    }
    this.inputs = bucket(this.order, target, view.nodes.length);
    this.outputs = bucket(this.order, source, view.nodes.length);
  }

  node(id: string | null): GraphNode | null {
    const index = id === null ? undefined : this.byId.get(id);
    return index === undefined ? null : this.view.nodes[index]!;
  }

  /** Edges into a node, strongest share first. */
  edgesInto(node: number): Uint32Array {
    return this.inputs[node] ?? new Uint32Array();
  }

  /** Edges out of a node, strongest share first. */
  edgesOutOf(node: number): Uint32Array {
    return this.outputs[node] ?? new Uint32Array();
  }

  connections(node: number, side: "inputs" | "outputs"): Connection[] {
    const { source, target, weight, share } = this.view.edges;
    const edges = side === "inputs" ? this.edgesInto(node) : this.edgesOutOf(node);
    const end = side === "inputs" ? source : target;
    return Array.from(edges, (edge) => ({
      node: this.view.nodes[end[edge]!]!,
      weight: weight[edge]!,
      share: share[edge]!,
    }));
  }

  /** Nodes that the filter shows, as a mask. */
  visible(filter: Filter): Uint8Array {
    return Uint8Array.from(this.view.nodes, (node) => {
      if (node.kind === "error") return filter.errors ? 1 : 0;
      if (node.kind === "token") return filter.tokens ? 1 : 0;
      return node.density !== null && node.density > filter.density ? 0 : 1;
    });
  }

  /** Edges that the filter shows between visible nodes, strongest first. */
  visibleEdges(filter: Filter, visible: Uint8Array): Uint32Array {
    const { source, target, weight } = this.view.edges;
    return this.order.filter((edge) => {
      const sign = weight[edge]! < 0 ? filter.negative : filter.positive;
      return sign && visible[source[edge]!] === 1 && visible[target[edge]!] === 1;
    });
  }
}

function bucket(order: Uint32Array, end: readonly number[], nodes: number): Uint32Array[] {
  const counts = new Uint32Array(nodes);
  for (const edge of order) counts[end[edge]!]! += 1;
  const buckets = Array.from(counts, (count) => new Uint32Array(count));
  counts.fill(0);
  for (const edge of order) {
    const node = end[edge]!;
    buckets[node]![counts[node]!] = edge;
    counts[node]! += 1;
  }
  return buckets;
}

/** A short name of a node: its label, or its layer and feature. */
export function nodeName(node: GraphNode, labels: Record<string, string> = {}): string {
  if (node.kind === "error") return "error";
  if (node.kind === "feature") {
    const own = labels[featureKey(node)];
    return own || node.label || `L${node.layer}/${String(node.feature)}`;
  }
  return visibleText(node.label);
}

/** An automatic label without the words around its tokens: `on "is", "of"` as `is, of`, `raises Austin` as `↑Austin`. */
export function shortLabel(label: string): string {
  const quoted = [...label.matchAll(/"((?:[^"\\]|\\.)+)"/g)].map((match) => match[1]!);
  if (label.startsWith("on ") && quoted.length > 0) return quoted.join(", ");
  return label.startsWith("raises ") ? `↑${label.slice(7)}` : label;
}

/** Key of a feature's label in the edits: layer/feature. */
export function featureKey(node: GraphNode): string {
  return `${node.layer}/${String(node.feature)}`;
}

/** Text with its spaces and line ends made visible where they lead, trail or stand alone. */
export function visibleText(text: string): string {
  const shown = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return shown.trim() === "" ? shown.replace(/ /g, "␣") || "∅" : shown.trim();
}

export function percent(share: number | null | undefined, digits = 0): string {
  if (share === null || share === undefined || Number.isNaN(share)) return "–";
  const value = 100 * share;
  if (value !== 0 && Math.abs(value) < 0.05) return "<0.1%";
  if (value !== 0 && Math.abs(value) < 1 && digits === 0) return `${value.toFixed(1)}%`;
  return `${value.toFixed(digits)}%`;
}

export function decimal(value: number | null | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size < 1e-6) return "0";
  if (size < 0.001 || size >= 10000) return value.toExponential(1).replace(/-/g, "−");
  return value.toFixed(size < 1 ? 3 : size < 100 ? 2 : 0).replace("-", "−");
}
