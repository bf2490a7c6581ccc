import { describe, expect, it } from "vitest";
import { pack, type Cell } from "../src/packing";

/** Thirty layers of ten columns with one to four boxes here and there, and one crowded cell. */
function deepCells(): Cell[] {
  const cells: Cell[] = [];
  let next = 0;
  for (let row = 0; row < 30; row++)
    for (let column = 0; column < 10; column++) {
      const count = row === 29 && column === 9 ? 17 : (row * 7 + column * 3) % 5 === 0 ? 1 + (row % 3) : 0;
      const nodes = Array.from({ length: count }, () => next++);
      if (count > 0) cells.push({ row, column, nodes });
    }
  return cells;
}

describe("pack", () => {
  const input = (width: number, height: number) => ({
    cells: deepCells(),
    spread: { row: 30, column: 9, nodes: [500, 501, 502, 503] },
    columns: 10,
    narrowest: 18,
    box: (node: number) => ({ width: 40 + (node % 4) * 12, height: 17 }),
    gaps: { node: 3, column: 9, row: 6 },
    available: { width, height },
  });

  it("fits everything at the scale that it says, and keeps every node", () => {
    const asked = input(930, 720);
    const packing = pack(asked);
    const width = packing.widths.reduce((sum, own) => sum + own + 9, 0);
    const height = [...packing.heights.values()].reduce((sum, own) => sum + own + 6, 0);
    expect(width * packing.scale).toBeLessThanOrEqual(930.01);
    expect(height * packing.scale).toBeLessThanOrEqual(720.01);
    expect(packing.scale).toBeGreaterThan(0.6);
    asked.cells.forEach((cell, i) => {
      expect(packing.lines[i]!.flat()).toEqual(cell.nodes);
      for (const line of packing.lines[i]!) {
        const own = line.reduce((sum, node) => sum + asked.box(node).width + 3, -3);
        expect(own).toBeLessThanOrEqual(packing.widths[cell.column]! + 0.01);
      }
    });
  });

  it("makes cells wide in a wide frame and high in a high one", () => {
    const crowded = (packing: ReturnType<typeof pack>) => packing.lines.at(-1)!.length;
    expect(crowded(pack(input(2400, 800)))).toBeLessThan(crowded(pack(input(600, 3000))));
  });
});
