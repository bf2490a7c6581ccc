/** Pinned nodes and supernodes: the boxes of the subgraph, the sums of their edges, and edits of them. */

import type { EditDocument, EdgeColumns, GraphNode, Group } from "./types";

export interface Box {
  /** The group's name, or the node's id. */
  id: string;
  name: string;
  nodes: GraphNode[];
  group: Group | null;
}

export interface BoxEdge {
  source: number;
  target: number;
  weight: number;
  /** |weight| over the mass of the rows of the target's nodes; NaN where it is not known. */
  share: number;
}

/** Boxes of the pinned nodes: one for a collapsed group, one for each other node. Unknown nodes are left out. */
export function boxesOf(document: EditDocument, find: (id: string) => GraphNode | null): Box[] {
  const boxes: Box[] = [];
  const grouped = new Set<string>();
  for (const group of document.groups) {
    const nodes = group.nodes.map(find).filter((node) => node !== null);
    group.nodes.forEach((id) => grouped.add(id));
    if (nodes.length === 0) continue;
    if (group.collapsed) boxes.push({ id: group.name, name: group.name, nodes, group });
    else for (const node of nodes) boxes.push({ id: node.id, name: "", nodes: [node], group });
  }
  for (const id of document.pins) {
    const node = grouped.has(id) ? null : find(id);
    if (node) boxes.push({ id, name: "", nodes: [node], group: null });
  }
  return boxes;
}

/**
 * Edges between boxes. Edges are linear, so the effect of one group on another is the sum of the edges from its nodes
 * to the other's; a share compares it with the mass of all rows of the target's nodes.
 */
export function boxEdges(boxes: Box[], nodes: GraphNode[], edges: EdgeColumns): BoxEdge[] {
  const boxOf = new Map<string, number>();
  boxes.forEach((box, index) => box.nodes.forEach((node) => boxOf.set(node.id, index)));
  const boxOfNode = nodes.map((node) => boxOf.get(node.id) ?? -1);
  const mass = rowMass(nodes.length, edges);
  const boxMass = new Float64Array(boxes.length);
  boxOfNode.forEach((box, node) => {
    if (box >= 0) boxMass[box]! += mass[node]!;
  });
  const sums = new Map<number, number>();
  for (let edge = 0; edge < edges.source.length; edge++) {
    const source = boxOfNode[edges.source[edge]!]!;
    const target = boxOfNode[edges.target[edge]!]!;
    if (source < 0 || target < 0 || source === target) continue;
    const key = source * boxes.length + target;
    sums.set(key, (sums.get(key) ?? 0) + edges.weight[edge]!);
  }
  return [...sums].map(([key, weight]) => {
    const target = key % boxes.length;
    const total = boxMass[target]!;
    return {
      source: Math.floor(key / boxes.length),
      target,
      weight,
      share: total > 0 ? Math.abs(weight) / total : Number.NaN,
    };
  });
}

function rowMass(count: number, edges: EdgeColumns): Float64Array {
  const mass = new Float64Array(count);
  edges.share.forEach((share, edge) => {
    if (share > 0) mass[edges.target[edge]!] = Math.abs(edges.weight[edge]!) / share;
  });
  return mass;
}

export function isPinned(document: EditDocument, id: string): boolean {
  return document.pins.includes(id) || document.groups.some((group) => group.nodes.includes(id));
}

export function groupOf(document: EditDocument, id: string): Group | null {
  return document.groups.find((group) => group.nodes.includes(id)) ?? null;
}

export function togglePin(document: EditDocument, id: string): void {
  if (isPinned(document, id)) unpin(document, [id]);
  else document.pins.push(id);
}

export function unpin(document: EditDocument, ids: string[]): void {
  const gone = new Set(ids);
  document.pins = document.pins.filter((pin) => !gone.has(pin));
  for (const group of document.groups) group.nodes = group.nodes.filter((node) => !gone.has(node));
  dropSmall(document);
}

/** Put nodes into one new group, out of the groups they were in; returns its name. */
export function groupNodes(document: EditDocument, ids: string[], name: string): string {
  const chosen = new Set(ids);
  for (const group of document.groups) group.nodes = group.nodes.filter((node) => !chosen.has(node));
  const unique = freeName(document, name);
  document.groups.push({ name: unique, nodes: [...chosen], collapsed: true });
  for (const id of chosen) if (!document.pins.includes(id)) document.pins.push(id);
  dropSmall(document);
  return unique;
}

export function addToGroup(document: EditDocument, name: string, ids: string[]): void {
  const target = document.groups.find((group) => group.name === name);
  if (!target) return;
  for (const group of document.groups)
    if (group !== target) group.nodes = group.nodes.filter((node) => !ids.includes(node));
  for (const id of ids) {
    if (!target.nodes.includes(id)) target.nodes.push(id);
    if (!document.pins.includes(id)) document.pins.push(id);
  }
  dropSmall(document);
}

export function ungroup(document: EditDocument, name: string): void {
  document.groups = document.groups.filter((group) => group.name !== name);
}

export function renameGroup(document: EditDocument, name: string, wanted: string): string {
  const group = document.groups.find((candidate) => candidate.name === name);
  if (!group || wanted === "" || wanted === name) return name;
  const unique = freeName(document, wanted);
  group.name = unique;
  const place = document.layout[name];
  if (place) {
    document.layout[unique] = place;
    document.layout = Object.fromEntries(Object.entries(document.layout).filter(([key]) => key !== name));
  }
  return unique;
}

/** Groups of fewer than two nodes are no groups; their nodes stay pinned. */
function dropSmall(document: EditDocument): void {
  document.groups = document.groups.filter((group) => group.nodes.length >= 2);
}

function freeName(document: EditDocument, wanted: string): string {
  const used = new Set(document.groups.map((group) => group.name));
  const base = wanted.trim() || "group";
  if (!used.has(base)) return base;
  for (let number = 2; ; number++) if (!used.has(`${base} ${number}`)) return `${base} ${number}`;
}
