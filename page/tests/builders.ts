import type { GraphNode, View } from "../src/types";

export function node(id: string, part: Partial<GraphNode> = {}): GraphNode {
  const words = id.split("/");
  const kind = words[0] === "error" || words[0] === "token" || words[0] === "target" ? words[0] : "feature";
  const numbers = words.map(Number);
  const layer = kind === "feature" ? numbers[0]! : kind === "error" ? numbers[1]! : kind === "target" ? 2 : 0;
  const position = kind === "error" ? numbers[2]! : kind === "target" ? 2 : numbers[1]!;
  return {
    id,
    kind,
    layer,
    position,
    feature: kind === "feature" ? numbers[2]! : null,
    value: null,
    label: id,
    automatic: false,
    influence: 0.1,
    cumulative: 0.5,
    density: null,
    weight: kind === "target" ? 1 : null,
    ...part,
  };
}

/** Two tokens, two features of each layer, an error and a target. Rows' masses: 4 each. */
export function smallView(): View {
  const nodes = ["0/1/5", "0/1/6", "1/2/7", "1/2/8", "error/0/1", "token/0", "token/1", "target/0"].map((id) =>
    node(id),
  );
  const edges: [number, number, number][] = [
    [6, 0, 4],
    [6, 1, 4],
    [0, 2, 3],
    [1, 2, -1],
    [0, 3, 1],
    [1, 3, 2],
    [4, 3, 1],
    [2, 7, 3],
    [3, 7, -1],
  ];
  return {
    name: "small",
    prompt: "a b c",
    tokens: ["a", "b", "c"],
    layers: 2,
    certificate: 0,
    provenance: {},
    thresholds: { node: 0.8, edge: 0.98 },
    first_thresholds: { node: 0.8, edge: 0.98 },
    total: { nodes: 8, features: 4, edges: 9 },
    scores: { replacement: 0.5, completeness: 0.5 },
    nodes,
    edges: {
      source: edges.map(([source]) => source),
      target: edges.map(([, target]) => target),
      weight: edges.map(([, , weight]) => weight),
      share: edges.map(([, , weight]) => Math.abs(weight) / 4),
    },
  };
}
