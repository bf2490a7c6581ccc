/** What changes from frame to frame: the names in the margin, and the node under the pointer with its edges. */

import type { Camera, Size } from "./camera";
import { CHIP_LIMIT } from "./layout";
import { outline, paintEdges, paintNodes, rowName, type Scene } from "./paint";
import { visibleText } from "./model";

export interface Focus {
  /** Node whose edges are drawn; -1 for none. */
  node: number;
  selected: number;
  chosen: number[];
  /** Edges and nodes of the paths that are shown. */
  pathNodes: number[];
  pathEdges: Uint32Array;
  /** Corners of a rectangle that is being drawn, in graph coordinates. */
  lasso: [number, number, number, number] | null;
}

const NAMED = 14; // neighbours whose names are written

export function paintOverlay(canvas: HTMLCanvasElement, scene: Scene, camera: Camera, size: Size, focus: Focus): void {
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  const width = Math.round(size.width * ratio);
  const height = Math.round(size.height * ratio);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d")!;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, width, height);
  context.setTransform(ratio * camera.k, 0, 0, ratio * camera.k, ratio * camera.dx, ratio * camera.dy);
  if (focus.pathEdges.length) paintPaths(context, scene, focus);
  else if (focus.node >= 0) paintFocus(context, scene, focus.node, camera);
  else if (!scene.layout.chips) paintMostNames(context, scene, camera);
  paintRings(context, scene, focus);
  if (focus.lasso) paintLasso(context, scene, focus.lasso, camera);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  paintMargins(context, scene, camera, size);
}

function paintPaths(context: CanvasRenderingContext2D, scene: Scene, focus: Focus): void {
  paintEdges(context, scene, focus.pathEdges, 0, focus.pathEdges.length, 1.6);
  paintNodes(context, scene, focus.pathNodes);
}

function paintFocus(context: CanvasRenderingContext2D, scene: Scene, node: number, camera: Camera): void {
  const { model, visible } = scene;
  const { source, target } = model.view.edges;
  const shown = (edges: Uint32Array): Uint32Array =>
    edges.filter((edge) => visible[source[edge]!] === 1 && visible[target[edge]!] === 1);
  const into = shown(model.edgesInto(node));
  const out = shown(model.edgesOutOf(node));
  paintEdges(context, scene, into, 0, into.length, 1.6);
  paintEdges(context, scene, out, 0, out.length, 1.6);
  const neighbours = new Set([node]);
  for (const edge of into) neighbours.add(source[edge]!);
  for (const edge of out) neighbours.add(target[edge]!);
  paintNodes(context, scene, neighbours);
  if (!scene.layout.chips) paintNames(context, scene, [node, ...strongest(scene, into, out)], camera);
}

function strongest(scene: Scene, into: Uint32Array, out: Uint32Array): number[] {
  const { source, target } = scene.model.view.edges;
  const half = NAMED / 2;
  return [...Array.from(into.slice(0, half), (e) => source[e]!), ...Array.from(out.slice(0, half), (e) => target[e]!)];
}

/** Names of the features, the most influential first, where they cover neither a node nor another name. */
function paintMostNames(context: CanvasRenderingContext2D, scene: Scene, camera: Camera): void {
  const { layout, model, visible } = scene;
  const { nodes } = model.view;
  const features = [...nodes.keys()].filter((i) => visible[i] && nodes[i]!.kind === "feature");
  if (features.length > CHIP_LIMIT) return;
  features.sort((a, b) => nodes[b]!.influence - nodes[a]!.influence);
  const [x, y, w, h] = [layout.x, layout.y, layout.w, layout.h];
  const taken = [...nodes.keys()]
    .filter((i) => w[i]! > 0)
    .map((i): Rectangle => {
      return [x[i]! - w[i]! / 2, y[i]! - h[i]! / 2, x[i]! + w[i]! / 2, y[i]! + h[i]! / 2];
    });
  paintNames(context, scene, features, camera, 16, taken);
}

type Rectangle = [number, number, number, number];

/** Names beside dots, at a constant size on the screen; one that would cover another, or what is `taken`, is left out. */
function paintNames(
  context: CanvasRenderingContext2D,
  scene: Scene,
  nodes: number[],
  camera: Camera,
  longest = 34,
  taken: Rectangle[] = [],
): void {
  const { layout, palette, model } = scene;
  const unit = 1 / camera.k;
  context.font = `${11 * unit}px ${palette.font}`;
  context.textAlign = "left";
  context.textBaseline = "middle";
  const placed = [...taken];
  for (const i of new Set(nodes)) {
    const node = model.view.nodes[i]!;
    if (layout.w[i] === 0 || layout.w[i]! > layout.h[i]! || node.kind === "error") continue;
    const text = scene.text(node).slice(0, longest);
    const width = context.measureText(text).width + 8 * unit;
    const left = layout.x[i]! + layout.w[i]! / 2 + 3 * unit;
    const top = layout.y[i]! - 8 * unit;
    const box: Rectangle = [left, top, left + width, top + 16 * unit];
    if (placed.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1]))
      continue;
    placed.push(box);
    context.fillStyle = palette.panel;
    context.globalAlpha = 0.92;
    context.beginPath();
    context.roundRect(left, top, width, 16 * unit, 3 * unit);
    context.fill();
    context.globalAlpha = 1;
    context.fillStyle = palette.ink;
    context.fillText(text, left + 4 * unit, layout.y[i]!);
  }
}

function paintRings(context: CanvasRenderingContext2D, scene: Scene, focus: Focus): void {
  const ring = (i: number, colour: string, grow: number, width: number): void => {
    if (i < 0 || scene.layout.w[i] === 0) return;
    outline(context, scene.model.view.nodes[i]!, scene.layout, i, grow);
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
  };
  for (const node of focus.chosen) ring(node, scene.palette.accent, 2.5, 1.5);
  if (focus.selected >= 0) paintNodes(context, scene, [focus.selected]);
  ring(focus.selected, scene.palette.accent, 3, 2.6);
  if (focus.node !== focus.selected) ring(focus.node, scene.palette.ink, 1.5, 1.5);
}

function paintLasso(
  context: CanvasRenderingContext2D,
  scene: Scene,
  [left, top, right, bottom]: [number, number, number, number],
  camera: Camera,
): void {
  context.fillStyle = scene.palette.accent;
  context.globalAlpha = 0.12;
  context.fillRect(left, top, right - left, bottom - top);
  context.globalAlpha = 1;
  context.strokeStyle = scene.palette.accent;
  context.lineWidth = 1 / camera.k;
  context.strokeRect(left, top, right - left, bottom - top);
}

function paintMargins(context: CanvasRenderingContext2D, scene: Scene, camera: Camera, size: Size): void {
  const { layout, palette, model } = scene;
  context.font = `11px ${palette.font}`;
  context.textBaseline = "middle";
  context.textAlign = "right";
  let last = -Infinity;
  for (const row of layout.rows) {
    const y = row.y * camera.k + camera.dy;
    if (y < 6 || y > size.height - 4 || y - last < 13) continue;
    last = y;
    tag(context, palette, rowName(row.layer, model.view.layers), 46, y, "right");
  }
  const tokens = layout.rows.find((row) => row.layer === -1);
  if (tokens && tokens.y * camera.k + camera.dy < size.height && layout.named && camera.k > 0.55) return;
  paintTokenStrip(context, scene, camera, size);
}

/** The tokens along the lower edge, where their own row is out of sight or too small to read. */
function paintTokenStrip(context: CanvasRenderingContext2D, scene: Scene, camera: Camera, size: Size): void {
  const { layout, palette, model } = scene;
  let free = 50;
  for (const column of layout.columns) {
    if (column.idle) continue;
    const x = ((column.left + column.right) / 2) * camera.k + camera.dx;
    const text = visibleText(model.view.tokens[column.first] ?? "").slice(0, 14);
    const width = context.measureText(text).width;
    if (x - width / 2 < free || x + width / 2 > size.width) continue;
    free = x + width / 2 + 10;
    tag(context, palette, text, x, size.height - 10, "center");
  }
}

function tag(
  context: CanvasRenderingContext2D,
  palette: Scene["palette"],
  text: string,
  x: number,
  y: number,
  align: "right" | "center",
): void {
  const width = context.measureText(text).width + 8;
  const left = align === "right" ? x - width + 4 : x - width / 2;
  context.textAlign = align;
  context.fillStyle = palette.panel;
  context.globalAlpha = 0.85;
  context.beginPath();
  context.roundRect(left, y - 8, width, 16, 4);
  context.fill();
  context.globalAlpha = 1;
  context.fillStyle = palette.muted;
  context.fillText(text, x, y + 0.5);
}
