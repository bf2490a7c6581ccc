/** The node under a point, by a grid of cells. */

import type { Layout } from "./layout";

const CELL = 48;

export class HitGrid {
  private readonly cells = new Map<string, number[]>();

  constructor(private readonly layout: Layout) {
    for (let i = 0; i < layout.x.length; i++) {
      if (layout.w[i] === 0) continue;
      const left = Math.floor((layout.x[i]! - layout.w[i]! / 2) / CELL);
      const right = Math.floor((layout.x[i]! + layout.w[i]! / 2) / CELL);
      for (let column = left; column <= right; column++) {
        const key = `${column}:${Math.floor(layout.y[i]! / CELL)}`;
        const cell = this.cells.get(key);
        if (cell) cell.push(i);
        else this.cells.set(key, [i]);
      }
    }
  }

  /** The nearest node whose box is within `reach` of the point; -1 if there is none. */
  nodeAt(x: number, y: number, reach: number): number {
    let best = -1;
    let least = reach;
    const span = Math.ceil(reach / CELL);
    const column = Math.floor(x / CELL);
    const row = Math.floor(y / CELL);
    for (let c = column - span; c <= column + span; c++)
      for (let r = row - span; r <= row + span; r++)
        for (const node of this.cells.get(`${c}:${r}`) ?? []) {
          const distance = this.distance(node, x, y);
          if (distance < least) {
            least = distance;
            best = node;
          }
        }
    return best;
  }

  /** Nodes whose middle lies in a rectangle. */
  nodesIn(left: number, top: number, right: number, bottom: number): number[] {
    const { x, y, w } = this.layout;
    const inside = (i: number): boolean => x[i]! >= left && x[i]! <= right && y[i]! >= top && y[i]! <= bottom;
    return Array.from(x.keys()).filter((i) => w[i]! > 0 && inside(i));
  }

  private distance(node: number, x: number, y: number): number {
    const { layout } = this;
    const dx = Math.max(0, Math.abs(x - layout.x[node]!) - layout.w[node]! / 2);
    const dy = Math.max(0, Math.abs(y - layout.y[node]!) - layout.h[node]! / 2);
    return Math.hypot(dx, dy);
  }
}
