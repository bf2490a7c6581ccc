import { describe, expect, it } from "vitest";
import { columnsOf, layOut } from "../src/layout";
import { HitGrid } from "../src/hit";
import { GraphModel, SHOW_ALL } from "../src/model";
import { nextNode } from "../src/walk";
import { node, smallView } from "./builders";

const options = (visible: Uint8Array) => ({
  visible,
  text: () => "label",
  measure: (text: string) => 7 * text.length,
  available: { width: 600, height: 400 },
});

describe("layOut", () => {
  it("puts targets on top, tokens at the bottom, and no two boxes onto each other", () => {
    const model = new GraphModel(smallView());
    const layout = layOut(model.view, options(model.visible(SHOW_ALL)));
    expect(layout.rows.map((row) => row.layer)).toEqual([2, 1, 0, -1]);
    expect(layout.y[7]).toBeLessThan(layout.y[2]!);
    expect(layout.y[0]).toBeLessThan(layout.y[6]!);
    for (let a = 0; a < 8; a++)
      for (let b = 0; b < a; b++) {
        const apart =
          Math.abs(layout.x[a]! - layout.x[b]!) >= (layout.w[a]! + layout.w[b]!) / 2 ||
          Math.abs(layout.y[a]! - layout.y[b]!) >= (layout.h[a]! + layout.h[b]!) / 2;
        expect(apart, `${a} and ${b}`).toBe(true);
      }
  });

  it("collapses runs of idle tokens in a long prompt", () => {
    const view = smallView();
    view.tokens = Array.from({ length: 512 }, (_, i) => `t${i}`);
    view.nodes[2] = node("1/400/7");
    const columns = columnsOf(view, new Uint8Array(8).fill(1));
    expect(columns.length).toBeLessThan(8);
    expect(columns.at(-1)).toMatchObject({ first: 401, last: 511, idle: true });
  });

  it("finds the node under a point, and walks along the strongest edges", () => {
    const model = new GraphModel(smallView());
    const layout = layOut(model.view, options(model.visible(SHOW_ALL)));
    expect(new HitGrid(layout).nodeAt(layout.x[2]! + 3, layout.y[2]!, 8)).toBe(2);
    expect(new HitGrid(layout).nodeAt(-500, -500, 8)).toBe(-1);
    expect(nextNode(model, layout, -1, "down")).toBe(7);
    expect(nextNode(model, layout, 7, "down")).toBe(2);
    expect(nextNode(model, layout, 2, "down")).toBe(0);
    expect(nextNode(model, layout, 0, "right")).toBe(1);
  });
});
