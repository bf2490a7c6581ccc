/** Where graphs come from: a server (ServerSource) or the page itself (EmbeddedSource). */

import type {
  Card,
  Change,
  Comparison,
  EditDocument,
  Edits,
  Estimate,
  Group,
  Intervened,
  NodeDetail,
  GraphNode,
  ServerState,
  StrongPath,
  Edges,
  Scores,
  TraceEvent,
  Thresholds,
  TraceRequest,
  View,
} from "./types";

export interface Source {
  /** A server answers; without one there is no card, no intervention, no comparison and no trace. */
  readonly live: boolean;
  state(): Promise<ServerState>;
  view(name: string, node: number | null, edge: number | null, signal?: AbortSignal): Promise<View>;
  node(name: string, id: string): Promise<NodeDetail>;
  paths(name: string, source: string, target: string, count: number): Promise<StrongPath[]>;
  search(name: string, text: string): Promise<{ nodes: GraphNode[]; total: number }>;
  /** Edges among nodes, of the complete graph. */
  edges(name: string, nodes: string[]): Promise<Edges>;
  scores(name: string, nodes: string[]): Promise<Scores>;
  group(name: string, nodes: string[], fixed: Record<string, string[]>): Promise<Group[]>;
  edits(name: string): Promise<Edits>;
  putEdits(name: string, revision: number, document: EditDocument): Promise<Edits>;
  undo(name: string, revision: number): Promise<Edits>;
  redo(name: string, revision: number): Promise<Edits>;
  importLink(name: string, text: string): Promise<Edits>;
  exported(name: string, flavour: string): Promise<string>;
  card(name: string, layer: number, feature: number): Promise<Card>;
  intervene(name: string, changes: Change[], freeze: string, generate: number): Promise<Intervened>;
  compare(a: string, b: string, align: string, thresholds: Thresholds): Promise<Comparison>;
  estimate(request: TraceRequest): Promise<Estimate>;
  trace(request: TraceRequest): Promise<string>;
  /** Trace the prompt of a graph under changes. */
  traceAfter(name: string, changes: Change[]): Promise<string>;
  watchTrace(id: string, listener: (event: TraceEvent) => void): () => void;
  cancelTrace(id: string): Promise<void>;
}

export const EMPTY_DOCUMENT: EditDocument = { labels: {}, pins: [], groups: [], layout: {} };
