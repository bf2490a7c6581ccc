/** Places of the nodes: a column for each token, a row for each layer, targets on top and tokens at the bottom. */

import {
  heightOf,
  lineHeight,
  linesOf,
  pack,
  type Box,
  type Cell,
  type Gaps,
  type Packing,
  type PackingInput,
} from "./packing";
import type { GraphNode, View } from "./types";

export interface Column {
  first: number;
  last: number;
  left: number;
  right: number;
  /** Tokens without nodes, drawn as one narrow column. */
  idle: boolean;
}

export interface Row {
  layer: number;
  y: number;
  top: number;
  bottom: number;
}

export interface Layout {
  x: Float32Array;
  y: Float32Array;
  /** Widths and heights of the boxes around x, y; zero for a node that is not drawn. */
  w: Float32Array;
  h: Float32Array;
  columns: Column[];
  rows: Row[];
  width: number;
  height: number;
  /** Nodes are boxes with text; else dots. */
  chips: boolean;
  /** Texts are the short ones. */
  short: boolean;
  /** Tokens are boxes with text; else squares. */
  named: boolean;
}

export interface LayoutOptions {
  visible: Uint8Array;
  /** Text of a node in a box, or a short one. */
  text: (node: GraphNode, short: boolean) => string;
  measure: (text: string) => number;
  available: { width: number; height: number };
}

export const CHIP_LIMIT = 150; // features that may be boxes with text
const DOT = 11;
const ERROR_DOT = 9;
const LONGEST_TARGET = 150;
const KEEP_ALL_COLUMNS = 24;
const KEEP_TOKENS = 12; // without nodes above them, in a longer prompt

/** A way to draw nodes, and the least scale at which it is legible. */
interface Style {
  chips: boolean;
  height: number;
  /** The widest box; longer texts are cut. */
  longest: number;
  /** Automatic labels without their first word and quotes. */
  short: boolean;
  gaps: Gaps;
  /** The most that columns and rows are moved apart where there is space. */
  spread: Box;
  least: number;
}

// From the roomiest to the tightest; the first that fits is taken.
const STYLES: Style[] = [
  { chips: true, height: 24, longest: 150, short: false, gaps: gaps(4, 14, 26), spread: box(56, 120), least: 0.92 },
  { chips: true, height: 20, longest: 130, short: true, gaps: gaps(4, 12, 12), spread: box(56, 120), least: 0.88 },
  { chips: true, height: 17, longest: 100, short: true, gaps: gaps(3, 9, 6), spread: box(48, 120), least: 0.84 },
  { chips: true, height: 16, longest: 76, short: true, gaps: gaps(3, 7, 5), spread: box(40, 120), least: 0.8 },
  { chips: false, height: 20, longest: 110, short: true, gaps: gaps(4, 9, 12), spread: box(28, 120), least: 0.7 },
  { chips: false, height: 16, longest: 52, short: true, gaps: gaps(3, 5, 5), spread: box(28, 120), least: 0.6 },
  { chips: false, height: 14, longest: 14, short: true, gaps: gaps(3, 3, 4), spread: box(28, 120), least: 0 },
];

function gaps(node: number, column: number, row: number): Gaps {
  return { node, column, row };
}

function box(width: number, height: number): Box {
  return { width, height };
}

export function layOut(view: View, options: LayoutOptions): Layout {
  const columns = columnsOf(view, options.visible);
  const cells = cellsOf(view, options.visible, columns);
  const features = view.nodes.filter((node, i) => options.visible[i] && node.kind === "feature").length;
  const styles = STYLES.filter((style) => !style.chips || features <= CHIP_LIMIT);
  for (const style of styles) {
    const layout = emptyLayout(view.nodes.length, columns, style);
    setSizes(layout, view, cells, style, options);
    const input = packingInput(view, layout, cells, style, options);
    const packing = pack(input);
    if (packing.scale < style.least && style !== styles.at(-1)) continue;
    place(layout, input, packing, style.spread);
    placeFolded(layout, view);
    return layout;
  }
  throw new Error("layOut: no style is left");
}

function emptyLayout(count: number, columns: Column[], { chips, short, longest, height }: Style): Layout {
  const numbers = (): Float32Array => new Float32Array(count);
  const own = columns.map((column) => ({ ...column }));
  const sizes = { x: numbers(), y: numbers(), w: numbers(), h: numbers() };
  return { ...sizes, columns: own, rows: [], width: 0, height: 0, chips, short, named: longest > height };
}

function setSizes(layout: Layout, view: View, cells: Cell[], style: Style, { text, measure }: LayoutOptions): void {
  for (const cell of cells)
    for (const i of cell.nodes) {
      const node = view.nodes[i]!;
      const boxed = node.kind === "target" || node.kind === "token" || (style.chips && node.kind === "feature");
      const dot = node.kind === "error" ? ERROR_DOT : DOT;
      const longest = node.kind === "target" ? LONGEST_TARGET : style.longest;
      const wide = (): number => measure(text(node, style.short)) * (node.kind === "target" ? 1.12 : 1) + 16;
      layout.w[i] = boxed ? Math.max(style.height, Math.min(longest, wide())) : dot;
      layout.h[i] = boxed ? style.height : dot;
    }
}

function packingInput(view: View, layout: Layout, cells: Cell[], style: Style, options: LayoutOptions): PackingInput {
  const outputs = cells.filter((cell) => cell.row === view.layers);
  const alone = outputs.length === 1;
  return {
    cells: alone ? cells.filter((cell) => cell !== outputs[0]) : cells,
    spread: alone ? outputs[0]! : null,
    columns: layout.columns.length,
    narrowest: style.longest > style.height ? 18 : 8,
    box: (node) => ({ width: layout.w[node]!, height: layout.h[node]! }),
    gaps: style.gaps,
    available: options.available,
  };
}

/**
 * Columns of a prompt. In a long one a run of tokens without nodes above them is one narrow column, unless they are
 * among the most influential tokens.
 */
export function columnsOf(view: View, visible: Uint8Array): Column[] {
  const collapse = view.tokens.length > KEEP_ALL_COLUMNS;
  const busy = busyPositions(view, visible);
  const columns: Column[] = [];
  for (let position = 0; position < view.tokens.length; position++) {
    const idle = busy[position] === 0;
    const previous = columns.at(-1);
    if (collapse && idle && previous?.idle) previous.last = position;
    else columns.push({ first: position, last: position, left: 0, right: 0, idle: collapse && idle });
  }
  return columns;
}

function busyPositions(view: View, visible: Uint8Array): Uint8Array {
  const busy = new Uint8Array(view.tokens.length);
  const feeding = new Set<number>();
  view.nodes.forEach((node, i) => {
    if (visible[i] && node.kind !== "token") busy[node.position] = 1;
  });
  view.edges.source.forEach((source, edge) => {
    if (view.nodes[source]!.kind === "token" && visible[source] && visible[view.edges.target[edge]!])
      feeding.add(source);
  });
  const strongest = [...feeding].sort((a, b) => view.nodes[b]!.influence - view.nodes[a]!.influence);
  for (const node of strongest.slice(0, KEEP_TOKENS)) busy[view.nodes[node]!.position] = 1;
  return busy;
}

/** Nodes of every token and layer: the most influential first, errors last. */
function cellsOf(view: View, visible: Uint8Array, columns: Column[]): Cell[] {
  const columnOf = new Map<number, number>();
  columns.forEach((column, index) => {
    for (let p = column.first; p <= column.last; p++) columnOf.set(p, index);
  });
  const cells = new Map<string, Cell>();
  view.nodes.forEach((node, i) => {
    const column = columnOf.get(node.position);
    if (!visible[i] || column === undefined) return;
    if (columns[column]!.idle && node.kind === "token") return;
    const row = rowOf(node, view.layers);
    const key = `${row}:${column}`;
    const cell = cells.get(key);
    if (cell) cell.nodes.push(i);
    else cells.set(key, { row, column, nodes: [i] });
  });
  const rank = (i: number): number => view.nodes[i]!.influence - (view.nodes[i]!.kind === "error" ? 1e6 : 0);
  for (const cell of cells.values()) cell.nodes.sort((a, b) => rank(b) - rank(a));
  return [...cells.values()];
}

/** Row of a node: -1 for tokens, its layer, or the number of layers for targets. */
export function rowOf(node: GraphNode, layers: number): number {
  return node.kind === "token" ? -1 : node.kind === "target" ? layers : node.layer;
}

function place(layout: Layout, input: PackingInput, packing: Packing, most: Box): void {
  const { available, gaps: least } = input;
  const { scale, widths, heights } = packing;
  const spare = (space: number, sizes: Iterable<number>, count: number): number =>
    (space / scale - [...sizes].reduce((sum, size) => sum + size, 0)) / Math.max(1, count);
  const across = spare(available.width, widths, widths.length);
  const gap = Math.min(most.width, Math.max(least.column, across));
  let x = gap / 2;
  layout.columns.forEach((column, index) => {
    column.left = x;
    column.right = x + widths[index]!;
    x = column.right + gap;
  });
  layout.width = x - gap / 2;
  const down = spare(available.height, heights.values(), heights.size);
  placeRows(layout, input, packing, Math.min(most.height, Math.max(least.row, down)));
}

function placeRows(layout: Layout, input: PackingInput, packing: Packing, gap: number): void {
  let y = gap / 4;
  const middles = new Map<number, number>();
  for (const layer of [...packing.heights.keys()].sort((a, b) => b - a)) {
    const height = packing.heights.get(layer)!;
    middles.set(layer, y + height / 2);
    layout.rows.push({ layer, y: y + height / 2, top: y, bottom: y + height });
    y += height + gap;
  }
  layout.height = y - (gap * 3) / 4;
  input.cells.forEach((cell, i) => {
    const column = layout.columns[cell.column]!;
    placeStack(layout, input, packing.lines[i]!, (column.left + column.right) / 2, middles.get(cell.row)!);
  });
  if (input.spread) placeSpread(layout, input, input.spread, middles.get(input.spread.row)!);
}

/** Let the edges of tokens that have no box begin where their column's dots are. */
function placeFolded(layout: Layout, view: View): void {
  const y = layout.rows.find((row) => row.layer === -1)?.top ?? layout.height;
  const idle = layout.columns.filter((column) => column.idle);
  view.nodes.forEach((node, i) => {
    const column =
      node.kind === "token" && idle.find(({ first, last }) => first <= node.position && node.position <= last);
    if (!column) return;
    layout.x[i] = (column.left + column.right) / 2;
    layout.y[i] = y;
  });
}

/** Place targets above the column that they are read at, or beside it where they are wider. */
function placeSpread(layout: Layout, input: PackingInput, spread: Cell, y: number): void {
  const column = layout.columns[spread.column]!;
  const lines = linesOf(spread.nodes, layout.width, input);
  const width = Math.max(...lines.map((line) => lineWidth(line, input)));
  const wanted = (column.left + column.right) / 2;
  placeStack(layout, input, lines, Math.max(width / 2, Math.min(layout.width - width / 2, wanted)), y);
}

function lineWidth(line: number[], { box: size, gaps: { node: gap } }: PackingInput): number {
  return line.reduce((sum, node) => sum + size(node).width + gap, -gap);
}

function placeStack(layout: Layout, input: PackingInput, lines: number[][], centre: number, middle: number): void {
  let y = middle - heightOf(lines, input) / 2;
  for (const line of lines) {
    const height = lineHeight(line, input.box);
    let x = centre - lineWidth(line, input) / 2;
    for (const node of line) {
      layout.x[node] = x + layout.w[node]! / 2;
      layout.y[node] = y + height / 2;
      x += layout.w[node]! + input.gaps.node;
    }
    y += height + input.gaps.node;
  }
}
