/** Places of the nodes: a column for each token, a row for each layer, targets on top and tokens at the bottom. */

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
}

export interface LayoutOptions {
  visible: Uint8Array;
  /** Text of a node in a box. */
  text: (node: GraphNode) => string;
  measure: (text: string) => number;
  available: { width: number; height: number };
}

export const CHIP_HEIGHT = 24;
export const CHIP_LIMIT = 150;
const DOT = 11;
const ERROR_DOT = 9;
const LONGEST_CHIP = 150;
const KEEP_ALL_COLUMNS = 24;

type Cell = number[];

export function layOut(view: View, options: LayoutOptions): Layout {
  const nodes = view.nodes;
  const inner = nodes.filter((node, i) => options.visible[i] && (node.kind === "feature" || node.kind === "error"));
  const chips = inner.length <= CHIP_LIMIT;
  const layout = emptyLayout(nodes.length, chips);
  setSizes(layout, nodes, options);
  const columns = columnsOf(view, options.visible);
  const columnOf = new Map<number, number>();
  columns.forEach((column, index) => {
    for (let p = column.first; p <= column.last; p++) columnOf.set(p, index);
  });
  const cells = cellsOf(view, options.visible, columns, columnOf);
  const lines = new Map<string, Cell[]>();
  for (const [key, cell] of cells) lines.set(key, linesOf(cell, layout, chips));
  placeColumns(layout, columns, lines, options);
  placeRows(layout, columns, lines, options);
  layout.columns = columns;
  return layout;
}

function emptyLayout(count: number, chips: boolean): Layout {
  const column = (): Float32Array => new Float32Array(count);
  return { x: column(), y: column(), w: column(), h: column(), columns: [], rows: [], width: 0, height: 0, chips };
}

function setSizes(layout: Layout, nodes: GraphNode[], { visible, text, measure }: LayoutOptions): void {
  nodes.forEach((node, i) => {
    if (!visible[i]) return;
    const boxed = node.kind === "target" || node.kind === "token" || (layout.chips && node.kind === "feature");
    const dot = node.kind === "error" ? (layout.chips ? 14 : ERROR_DOT) : DOT;
    layout.w[i] = boxed ? Math.min(LONGEST_CHIP, measure(text(node)) * (node.kind === "target" ? 1.12 : 1) + 16) : dot;
    layout.h[i] = boxed ? CHIP_HEIGHT : dot;
  });
}

/** Columns of a prompt: runs of tokens that nothing stands above become one idle column in a long prompt. */
export function columnsOf(view: View, visible: Uint8Array): Column[] {
  const busy = new Uint8Array(view.tokens.length);
  view.nodes.forEach((node, i) => {
    if (visible[i] && node.kind !== "token") busy[node.position] = 1;
  });
  view.edges.source.forEach((source, edge) => {
    const node = view.nodes[source]!;
    if (node.kind === "token" && visible[source] && visible[view.edges.target[edge]!]) busy[node.position] = 1;
  });
  const columns: Column[] = [];
  const collapse = view.tokens.length > KEEP_ALL_COLUMNS;
  for (let position = 0; position < view.tokens.length; position++) {
    const idle = busy[position] === 0;
    const previous = columns.at(-1);
    if (collapse && idle && previous?.idle) previous.last = position;
    else columns.push({ first: position, last: position, left: 0, right: 0, idle: collapse && idle });
  }
  return columns;
}

function cellsOf(view: View, visible: Uint8Array, columns: Column[], columnOf: Map<number, number>): Map<string, Cell> {
  const cells = new Map<string, Cell>();
  view.nodes.forEach((node, i) => {
    const column = columnOf.get(node.position);
    if (!visible[i] || column === undefined) return;
    if (columns[column]!.idle && node.kind === "token") return;
    const key = `${rowOf(node, view.layers)}:${column}`;
    const cell = cells.get(key);
    if (cell) cell.push(i);
    else cells.set(key, [i]);
  });
  const rank = (i: number): number => view.nodes[i]!.influence - (view.nodes[i]!.kind === "error" ? 1e6 : 0);
  for (const cell of cells.values()) cell.sort((a, b) => rank(b) - rank(a));
  return cells;
}

/** Row of a node: -1 for tokens, its layer, or the number of layers for targets. */
export function rowOf(node: GraphNode, layers: number): number {
  return node.kind === "token" ? -1 : node.kind === "target" ? layers : node.layer;
}

const GAP = 4;

function linesOf(cell: Cell, layout: Layout, chips: boolean): Cell[] {
  const widest = chips ? 260 : Math.max(1, Math.ceil(Math.sqrt(cell.length * 1.5))) * (DOT + GAP);
  const lines: Cell[] = [];
  let used = Infinity;
  for (const node of cell) {
    const width = layout.w[node]! + GAP;
    if (used + width > widest + GAP) {
      lines.push([]);
      used = 0;
    }
    lines.at(-1)!.push(node);
    used += width;
  }
  return lines;
}

const lineWidth = (line: Cell, layout: Layout): number => line.reduce((sum, node) => sum + layout.w[node]! + GAP, -GAP);
const lineHeight = (line: Cell, layout: Layout): number => Math.max(...line.map((node) => layout.h[node]!));
const stackHeight = (lines: Cell[], layout: Layout): number =>
  lines.reduce((sum, line) => sum + lineHeight(line, layout) + GAP, -GAP);

function placeColumns(layout: Layout, columns: Column[], lines: Map<string, Cell[]>, options: LayoutOptions): void {
  const widths = new Float64Array(columns.length).fill(18);
  for (const [key, stack] of lines) {
    const column = Number(key.split(":")[1]);
    for (const line of stack) widths[column] = Math.max(widths[column]!, lineWidth(line, layout));
  }
  const total = widths.reduce((sum, width) => sum + width, 0);
  const spare = (options.available.width - total) / Math.max(1, columns.length);
  const gap = Math.min(layout.chips ? 56 : 28, Math.max(layout.chips ? 18 : 9, spare));
  let x = gap / 2;
  columns.forEach((column, index) => {
    column.left = x;
    column.right = x + widths[index]!;
    x = column.right + gap;
  });
  layout.width = x - gap / 2;
}

function placeRows(layout: Layout, columns: Column[], lines: Map<string, Cell[]>, options: LayoutOptions): void {
  const heights = new Map<number, number>();
  for (const [key, stack] of lines) {
    const row = Number(key.split(":")[0]);
    heights.set(row, Math.max(heights.get(row) ?? 0, stackHeight(stack, layout)));
  }
  const rows = [...heights.keys()].sort((a, b) => b - a);
  const total = rows.reduce((sum, row) => sum + heights.get(row)!, 0);
  const spare = (options.available.height - total) / Math.max(1, rows.length);
  const gap = Math.min(120, Math.max(layout.chips ? 44 : 22, spare));
  let y = gap / 4;
  for (const row of rows) {
    const height = heights.get(row)!;
    columns.forEach((column, index) => placeStack(layout, lines.get(`${row}:${index}`), column, y + height / 2));
    layout.rows.push({ layer: row, y: y + height / 2, top: y, bottom: y + height });
    y += height + gap;
  }
  layout.height = y - (gap * 3) / 4;
}

function placeStack(layout: Layout, stack: Cell[] | undefined, column: Column, middle: number): void {
  if (!stack) return;
  let y = middle - stackHeight(stack, layout) / 2;
  for (const line of stack) {
    const height = lineHeight(line, layout);
    let x = (column.left + column.right - lineWidth(line, layout)) / 2;
    for (const node of line) {
      layout.x[node] = x + layout.w[node]! / 2;
      layout.y[node] = y + height / 2;
      x += layout.w[node]! + GAP;
    }
    y += height + GAP;
  }
}
