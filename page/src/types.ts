/** The JSON that the server sends; docs/page-api.md describes it. */

export type Kind = "feature" | "error" | "token" | "target";

export interface GraphNode {
  id: string;
  kind: Kind;
  layer: number;
  position: number;
  feature: number | null;
  value: number | null;
  label: string;
  automatic: boolean;
  influence: number;
  cumulative: number;
  density: number | null;
  weight: number | null;
}

/** Edges as columns; source and target index the nodes, share is |weight| over the mass of the target's row. */
export interface EdgeColumns {
  source: number[];
  target: number[];
  weight: number[];
  share: number[];
}

export interface Thresholds {
  node: number;
  edge: number;
}

export interface Scores {
  replacement: number | null;
  completeness: number | null;
}

export interface View {
  name: string;
  prompt: string;
  tokens: string[];
  layers: number;
  certificate: number | null;
  provenance: Record<string, unknown>;
  thresholds: Thresholds;
  first_thresholds: Thresholds;
  total: { nodes: number; features: number; edges: number };
  scores: Scores;
  nodes: GraphNode[];
  edges: EdgeColumns;
}

export interface GraphFile {
  name: string;
  title: string;
  kind: string;
  bytes: number;
  modified: number | string;
  tokens: number | null;
  features: number | null;
  error: string | null;
}

export interface ServerState {
  version: string;
  model: { name: string; layers: number; can_trace: boolean; can_intervene: boolean } | null;
  graphs: GraphFile[];
}

export interface Connection {
  node: GraphNode;
  weight: number;
  share: number;
}

export interface NodeDetail {
  node: GraphNode;
  inputs: Connection[];
  outputs: Connection[];
  totals: Record<string, unknown>;
}

export interface StrongPath {
  nodes: GraphNode[];
  weights: number[];
  strength: number;
  sign: number;
}

export interface Group {
  name: string;
  nodes: string[];
  collapsed: boolean;
}

export interface EditDocument {
  labels: Record<string, string>;
  pins: string[];
  groups: Group[];
  layout: Record<string, [number, number]>;
}

export interface Edits {
  revision: number;
  document: EditDocument;
  can_undo: boolean;
  can_redo: boolean;
}

/** Nodes and the edges among them, in the complete graph. */
export interface Edges {
  nodes: GraphNode[];
  edges: EdgeColumns;
}

export interface TokenValue {
  token: string;
  value: number;
}

export interface Example {
  quantile: string | null;
  tokens: string[];
  values: number[];
}

export interface Card {
  here: { position: number; value: number }[];
  label: string;
  automatic: boolean;
  raised: TokenValue[];
  lowered: TokenValue[];
  examples: Example[];
  histogram: { edges: number[]; counts: number[] } | null;
  density: number | null;
}

export interface Change {
  nodes: string[];
  value?: number;
  scale?: number;
  ablate?: boolean;
  everywhere: boolean;
}

export interface TokenProbability {
  token: string;
  probability: number;
}

/** predicted: its activation by the graph; change, foretold: of its input, measured and by the graph. */
export interface ChangedNode {
  id: string;
  changed: boolean;
  before: number | null;
  after: number | null;
  predicted: number | null;
  change: number | null;
  foretold: number | null;
}

export interface Intervened {
  before: TokenProbability[];
  after: TokenProbability[];
  nodes: ChangedNode[];
  agreement: { correlation: number | null; sign: number | null } | null;
  text: { before: string; after: string } | null;
  notes: string[];
}

/** A node that the other graph does not have. */
export interface OwnNode {
  node: GraphNode;
  influence: number;
}

export interface Comparison {
  only_a: OwnNode[];
  only_b: OwnNode[];
  both: { a: GraphNode; b: GraphNode; influence_change: number }[];
  edges: Record<string, unknown>;
  summary: { only_a: number; only_b: number; both: number; similarity: number };
}

export interface Estimate {
  bytes: number;
  seconds: number | null;
  text: string;
}

export interface TraceRequest {
  prompt: string;
  targets: (string | { tokens: string[]; against: string[] })[] | null;
  position: number;
  max_features: number | null;
}

export interface TraceEvent {
  phase?: string;
  done?: number;
  total?: number;
  graph?: string;
  error?: string;
  cancelled?: boolean;
}
