import { describe, expect, it } from "vitest";
import { EmbeddedSource, pruned } from "../src/embedded_source";
import { strongestPaths } from "../src/strongest_paths";
import { GraphModel } from "../src/model";
import { History } from "../src/history";
import { EMPTY_DOCUMENT } from "../src/source";
import { smallView } from "./builders";

describe("a page without a server", () => {
  it("prunes nodes by cumulative influence and edges from the strongest down", () => {
    const view = smallView();
    view.nodes[1]!.cumulative = 0.9;
    const less = pruned(view, 0.8, 1);
    expect(less.nodes.map((node) => node.id)).not.toContain("0/1/6");
    expect(less.edges.source.length).toBe(6);
    expect(less.nodes[less.edges.target[0]!]!.id).toBe("target/0");
    expect(pruned(view, 1, 0.5).edges.source.length).toBe(1);
  });

  it("finds the strongest paths by the product of shares, with their sign", () => {
    const paths = strongestPaths(new GraphModel(smallView()), "token/1", "target/0", 3);
    expect(paths.map((path) => path.nodes.map((node) => node.id).join(" "))).toEqual([
      "token/1 0/1/5 1/2/7 target/0",
      "token/1 0/1/6 1/2/7 target/0",
      "token/1 0/1/6 1/2/8 target/0",
    ]);
    expect(paths[0]).toMatchObject({ strength: 0.5625, sign: 1 });
    expect(paths[1]!.sign).toBe(-1);
  });

  it("searches names and identifiers", async () => {
    const source = new EmbeddedSource({ version: "0", view: smallView() });
    expect((await source.search("small", "1/8")).nodes.map((node) => node.id)).toEqual(["1/2/8"]);
    expect((await source.search("small", "")).total).toBe(0);
  });

  it("undoes and redoes", () => {
    const history = new History(EMPTY_DOCUMENT);
    history.add({ ...EMPTY_DOCUMENT, pins: ["0/1/5"] });
    expect(history.undo()).toMatchObject({ document: EMPTY_DOCUMENT, can_undo: false, can_redo: true });
    expect(history.redo().document.pins).toEqual(["0/1/5"]);
  });
});
