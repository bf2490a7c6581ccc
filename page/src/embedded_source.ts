/** Graphs that travel with the page: a file by itself, or a notebook's widget. What is embedded can be pruned further. */

import { GraphModel, nodeName } from "./model";
import { EMPTY_DOCUMENT, type Source } from "./source";
import { strongestPaths } from "./strongest_paths";
import { History } from "./history";
import type { EdgeColumns, Edges, Edits, GraphNode, NodeDetail, ServerState, StrongPath, Scores, View } from "./types";

export interface Embedded {
  version: string;
  view: View;
  document?: Edits["document"];
}

const absent = (): Promise<never> =>
  Promise.reject(new Error("This page has no server; open the graph with pycircuit serve"));

export class EmbeddedSource implements Source {
  readonly live = false;
  private readonly model: GraphModel;
  private readonly history: History;

  constructor(private readonly data: Embedded) {
    this.model = new GraphModel(data.view);
    this.history = new History({ ...EMPTY_DOCUMENT, ...data.document });
  }

  state(): Promise<ServerState> {
    const { name, prompt } = this.data.view;
    const { nodes } = this.data.view;
    const graph = {
      name,
      title: prompt,
      kind: "embedded",
      bytes: 0,
      modified: 0,
      tokens: this.data.view.tokens.length,
      features: nodes.filter((node) => node.kind === "feature").length,
      error: null,
    };
    return Promise.resolve({ version: this.data.version, model: null, graphs: [graph] });
  }

  view(_: string, node: number | null, edge: number | null): Promise<View> {
    const first = this.data.view.first_thresholds;
    return Promise.resolve(pruned(this.data.view, node ?? first.node, edge ?? first.edge));
  }

  node(_: string, id: string): Promise<NodeDetail> {
    const index = this.model.byId.get(id);
    if (index === undefined) return Promise.reject(new Error(`${id} is not in this page`));
    return Promise.resolve({
      node: this.data.view.nodes[index]!,
      inputs: this.model.connections(index, "inputs").slice(0, 100),
      outputs: this.model.connections(index, "outputs").slice(0, 100),
      totals: {},
    });
  }

  paths(_: string, source: string, target: string, count: number): Promise<StrongPath[]> {
    return Promise.resolve(strongestPaths(this.model, source, target, count));
  }

  search(_: string, text: string): Promise<{ nodes: GraphNode[]; total: number }> {
    const wanted = text.trim().toLowerCase();
    const labels = this.history.edits().document.labels;
    const matches = this.data.view.nodes.filter(
      (node) => wanted !== "" && (nodeName(node, labels).toLowerCase().includes(wanted) || matchesId(node, wanted)),
    );
    matches.sort((a, b) => b.influence - a.influence);
    return Promise.resolve({ nodes: matches.slice(0, 100), total: matches.length });
  }

  edges(): Promise<Edges> {
    const { nodes, edges } = this.data.view;
    return Promise.resolve({ nodes, edges });
  }

  scores(): Promise<Scores> {
    return Promise.resolve({ replacement: null, completeness: null });
  }

  edits(): Promise<Edits> {
    return Promise.resolve(this.history.edits());
  }

  putEdits(_: string, __: number, document: Edits["document"]): Promise<Edits> {
    return Promise.resolve(this.history.add(document));
  }

  undo(): Promise<Edits> {
    return Promise.resolve(this.history.undo());
  }

  redo(): Promise<Edits> {
    return Promise.resolve(this.history.redo());
  }

  exported(): Promise<string> {
    return Promise.resolve(JSON.stringify({ ...this.data, document: this.history.edits().document }));
  }

  group = absent;
  importLink = absent;
  card = absent;
  intervene = absent;
  compare = absent;
  estimate = absent;
  trace = absent;
  traceAfter = absent;
  cancelTrace = absent;
  watchTrace = (): (() => void) => () => undefined;
}

function matchesId(node: GraphNode, wanted: string): boolean {
  return node.id.startsWith(wanted) || (node.kind === "feature" && `${node.layer}/${String(node.feature)}` === wanted);
}

/** The view pruned further: nodes by their cumulative influence, edges by theirs, from the strongest down. */
export function pruned(view: View, node: number, edge: number): View {
  const kept = view.nodes.map(
    (candidate) => candidate.kind === "token" || candidate.kind === "target" || candidate.cumulative <= node + 1e-9,
  );
  const place = new Int32Array(view.nodes.length).fill(-1);
  let count = 0;
  kept.forEach((keep, i) => {
    if (keep) place[i] = count++;
  });
  const { source, target, weight, share } = view.edges;
  const strength = (i: number): number => share[i]! * influenceOf(view.nodes[target[i]!]!);
  const inside = [...source.keys()].filter((i) => place[source[i]!]! >= 0 && place[target[i]!]! >= 0);
  inside.sort((a, b) => strength(b) - strength(a));
  const total = inside.reduce((sum, i) => sum + strength(i), 0);
  const edges: EdgeColumns = { source: [], target: [], weight: [], share: [] };
  let covered = 0;
  for (const i of inside) {
    if (edge < 1 && covered >= edge * total) break;
    covered += strength(i);
    edges.source.push(place[source[i]!]!);
    edges.target.push(place[target[i]!]!);
    edges.weight.push(weight[i]!);
    edges.share.push(share[i]!);
  }
  return { ...view, thresholds: { node, edge }, nodes: view.nodes.filter((_, i) => kept[i]), edges };
}

const influenceOf = (node: GraphNode): number => (node.kind === "target" ? (node.weight ?? 0) : node.influence);
