/** Places of the boxes of the subgraph: rows from tokens to outputs, order along the prompt, moved where a hand put them. */

import type { Box } from "./groups";

export interface PlacedBox extends Box {
  x: number;
  y: number;
  w: number;
}

export const BOX_HEIGHT = 28;
const EDGE = 12;

export interface Frame {
  width: number;
  height: number;
  layers: number;
}

/** Row of a box: -1 for tokens, the number of layers for targets, else the mean layer of its nodes. */
export function boxRow(box: Box, layers: number): number {
  const rows = box.nodes.map((node) => (node.kind === "token" ? -1 : node.kind === "target" ? layers : node.layer));
  return Math.round(rows.reduce((sum, row) => sum + row, 0) / rows.length);
}

export function placeBoxes(
  boxes: Box[],
  hand: Record<string, [number, number]>,
  frame: Frame,
  measure: (box: Box) => number,
): PlacedBox[] {
  const rows = new Map<number, PlacedBox[]>();
  const placed = boxes.map((box) => {
    const item = { ...box, x: 0, y: 0, w: measure(box) };
    const row = boxRow(box, frame.layers);
    rows.set(row, [...(rows.get(row) ?? []), item]);
    return item;
  });
  const lines = [...rows.keys()].sort((a, b) => b - a).flatMap((row) => linesOf(rows.get(row)!, frame.width));
  const step =
    lines.length > 1 ? Math.max(BOX_HEIGHT + 20, (frame.height - BOX_HEIGHT - 2 * EDGE) / (lines.length - 1)) : 0;
  lines.forEach((line, i) => spread(line, frame.width, EDGE + BOX_HEIGHT / 2 + i * step));
  if (lines.length === 1) for (const box of lines[0]!) box.y = frame.height / 2;
  for (const box of placed) {
    const place = hand[box.id];
    if (place) [box.x, box.y] = place;
  }
  return placed;
}

function linesOf(row: PlacedBox[], width: number): PlacedBox[][] {
  row.sort((a, b) => meanPosition(a) - meanPosition(b));
  const lines: PlacedBox[][] = [[]];
  let used = 0;
  for (const box of row) {
    if (used + box.w + EDGE > width - 2 * EDGE && lines.at(-1)!.length > 0) {
      lines.push([]);
      used = 0;
    }
    lines.at(-1)!.push(box);
    used += box.w + EDGE;
  }
  return lines;
}

const meanPosition = (box: Box): number => box.nodes.reduce((sum, node) => sum + node.position, 0) / box.nodes.length;

/** Spread a row evenly over the width. */
function spread(line: PlacedBox[], width: number, y: number): void {
  const total = line.reduce((sum, box) => sum + box.w, 0);
  const gap = Math.min(90, (width - total) / (line.length + 1));
  let x = (width - total - gap * (line.length - 1)) / 2;
  for (const box of line) {
    box.x = x + box.w / 2;
    box.y = y;
    x += box.w + gap;
  }
}

/** The smallest frame that holds all boxes, at least as large as the given one. */
export function extent(boxes: PlacedBox[], frame: Frame): { left: number; top: number; width: number; height: number } {
  const left = Math.min(0, ...boxes.map((box) => box.x - box.w / 2 - EDGE));
  const top = Math.min(0, ...boxes.map((box) => box.y - BOX_HEIGHT / 2 - EDGE));
  const right = Math.max(frame.width, ...boxes.map((box) => box.x + box.w / 2 + EDGE));
  const bottom = Math.max(frame.height, ...boxes.map((box) => box.y + BOX_HEIGHT / 2 + EDGE));
  return { left, top, width: right - left, height: bottom - top };
}
