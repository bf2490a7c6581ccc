/** Drawing of edges and nodes on a canvas. The context's transform takes graph coordinates to pixels. */

import type { GraphModel } from "./model";
import type { Layout } from "./layout";
import { mix, type Palette } from "./palette";
import type { GraphNode } from "./types";

export interface Scene {
  model: GraphModel;
  layout: Layout;
  palette: Palette;
  /** The greatest influence of a feature. */
  highest: number;
  /** Visible edges, strongest first. */
  edges: Uint32Array;
  visible: Uint8Array;
  text: (node: GraphNode) => string;
  pinned: Set<string>;
  groupColours: Map<string, string>;
  /** Nodes that the graph which this one is compared with lacks. */
  own: ReadonlySet<string>;
}

const BATCH = 150; // curves in one path: long paths are slow to fill
const CURVES_UP_TO = 6000;
const FEW_EDGES = 500; // are drawn darker

/** The greatest influence of a feature of a model. */
export function highestInfluence(model: GraphModel): number {
  return model.view.nodes.reduce(
    (most, node) => (node.kind === "feature" ? Math.max(most, node.influence) : most),
    1e-12,
  );
}

/** Level of an edge's width and darkness, 0 to 5, by its share of the target's input. */
export function level(share: number): number {
  if (share >= 0.25) return 5;
  if (share >= 0.1) return 4;
  if (share >= 0.04) return 3;
  if (share >= 0.015) return 2;
  return share >= 0.005 ? 1 : 0;
}

const WIDTHS = [0.5, 0.7, 1.1, 1.8, 3, 4.6];
const ALPHAS = [0.1, 0.16, 0.26, 0.4, 0.58, 0.75];

/** Draw edges from `from` to `to` of the order of `edges`, the weaker ones first. */
export function paintEdges(
  context: CanvasRenderingContext2D,
  scene: Scene,
  edges: Uint32Array,
  from: number,
  to: number,
  strength = 1,
): void {
  const { weight, share } = scene.model.view.edges;
  const curved = scene.edges.length <= CURVES_UP_TO || strength > 1;
  let style = -1;
  let batch = 0;
  for (let i = to - 1; i >= from; i--) {
    const edge = edges[i]!;
    const size = level(share[edge]!);
    const next = size * 2 + (weight[edge]! < 0 ? 1 : 0);
    if (next !== style || batch >= BATCH) {
      if (style >= 0) context.stroke();
      if (next !== style) setStyle(context, scene, next, strength);
      style = next;
      batch = 0;
      context.beginPath();
    }
    batch += 1;
    trace(context, scene, edge, curved);
  }
  if (style >= 0) context.stroke();
  context.globalAlpha = 1;
  context.setLineDash([]);
}

function setStyle(context: CanvasRenderingContext2D, scene: Scene, style: number, strength: number): void {
  const size = style >> 1;
  const negative = style % 2 === 1;
  context.strokeStyle = negative ? scene.palette.negative : scene.palette.positive;
  const few = scene.edges.length <= FEW_EDGES && strength === 1 ? 2 : 1;
  context.globalAlpha = Math.min(0.95 - 0.2 * (few - 1), ALPHAS[size]! * strength * few + (strength > 1 ? 0.2 : 0));
  context.lineWidth = WIDTHS[size]! * (strength > 1 ? 1.25 : 1);
  // A second sign of a negative weight beside its colour.
  context.setLineDash(negative && (strength > 1 || scene.layout.chips) ? [6, 4] : []);
}

function trace(context: CanvasRenderingContext2D, scene: Scene, edge: number, curved: boolean): void {
  const [x1, y1, x2, y2] = ends(scene, edge);
  context.moveTo(x1, y1);
  const bend = Math.max(12, Math.abs(y1 - y2) * 0.45);
  if (curved) context.bezierCurveTo(x1, y1 - bend, x2, y2 + bend, x2, y2);
  else context.lineTo(x2, y2);
}

/** Where an edge leaves its source, at the top, and enters its target, at the bottom. */
export function ends(scene: Scene, edge: number): [number, number, number, number] {
  const { source, target } = scene.model.view.edges;
  const { x, y, h } = scene.layout;
  const from = source[edge]!;
  const to = target[edge]!;
  return [x[from]!, y[from]! - h[from]! / 2, x[to]!, y[to]! + h[to]! / 2];
}

export function paintNodes(context: CanvasRenderingContext2D, scene: Scene, nodes: Iterable<number>): void {
  const { layout, model, palette } = scene;
  context.textBaseline = "middle";
  context.textAlign = "center";
  for (const i of nodes) {
    if (layout.w[i] === 0) continue;
    const node = model.view.nodes[i]!;
    const pinned = scene.pinned.has(node.id);
    const colours = coloursOf(node, palette, Math.sqrt(Math.max(0, node.influence) / scene.highest));
    outline(context, node, layout, i);
    context.fillStyle = colours.fill;
    context.fill();
    context.lineWidth = pinned ? 2.2 : 1;
    context.strokeStyle = pinned ? (scene.groupColours.get(node.id) ?? palette.pin) : colours.line;
    context.stroke();
    if (layout.w[i]! > layout.h[i]!) paintText(context, scene, node, i, colours.text);
    if (scene.own.has(node.id)) {
      outline(context, node, layout, i, 2.5);
      context.lineWidth = 2;
      context.strokeStyle = palette.accent;
      context.stroke();
    }
  }
}

function paintText(context: CanvasRenderingContext2D, scene: Scene, node: GraphNode, i: number, colour: string): void {
  const { layout, palette } = scene;
  context.font = `${node.kind === "target" ? "600 " : node.automatic ? "italic " : ""}12px ${palette.font}`;
  context.fillStyle = colour;
  context.fillText(clip(context, scene.text(node), layout.w[i]! - 12), layout.x[i]!, layout.y[i]! + 0.5);
}

function clip(context: CanvasRenderingContext2D, text: string, width: number): string {
  if (context.measureText(text).width <= width + 1) return text;
  let end = text.length - 1;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > width) end -= 1;
  return `${text.slice(0, end).trimEnd()}…`;
}

export function coloursOf(
  node: GraphNode,
  palette: Palette,
  share: number,
): { fill: string; line: string; text: string } {
  const colour = palette[node.kind];
  const amount = node.kind === "feature" ? 0.1 + 0.5 * Math.min(1, share) : node.kind === "error" ? 0 : 0.22;
  return {
    fill: mix(palette.panel, colour, amount),
    line: mix(palette.panel, colour, node.kind === "error" ? 0.8 : 0.75),
    text: palette.ink,
  };
}

/** The outline of a node: a shape for each kind, so that colour is not the only difference. */
export function outline(context: CanvasRenderingContext2D, node: GraphNode, layout: Layout, i: number, grow = 0): void {
  const x = layout.x[i]!;
  const y = layout.y[i]!;
  const w = layout.w[i]! / 2 + grow;
  const h = layout.h[i]! / 2 + grow;
  context.beginPath();
  if (node.kind === "error") {
    context.moveTo(x, y - h);
    context.lineTo(x + w, y);
    context.lineTo(x, y + h);
    context.lineTo(x - w, y);
    context.closePath();
  } else if (node.kind === "feature" && layout.w[i]! <= layout.h[i]!) context.arc(x, y, w, 0, 2 * Math.PI);
  else context.roundRect(x - w, y - h, 2 * w, 2 * h, node.kind === "token" ? 3 : node.kind === "target" ? 7 : h);
}

/** Bands of every other column and the lines of layers, behind everything. */
export function paintGround(context: CanvasRenderingContext2D, scene: Scene): void {
  const { layout, palette } = scene;
  context.fillStyle = palette.band;
  layout.columns.forEach((column, index) => {
    if (index % 2 === 0) context.fillRect(column.left - 4, 0, column.right - column.left + 8, layout.height);
  });
  context.textBaseline = "middle";
  context.textAlign = "center";
  context.font = `11px ${palette.font}`;
  context.fillStyle = palette.muted;
  const bottom = layout.rows.find((row) => row.layer === -1)?.y;
  for (const column of layout.columns)
    if (column.idle && bottom !== undefined) {
      const count = column.last - column.first + 1;
      context.fillText("⋯", (column.left + column.right) / 2, bottom - (layout.named ? 6 : 0));
      if (layout.named) context.fillText(String(count), (column.left + column.right) / 2, bottom + 7);
    }
}

/** Name of a row in the margin. */
export function rowName(layer: number, layers: number): string {
  return layer < 0 ? "tokens" : layer === layers ? "output" : `L${layer}`;
}
