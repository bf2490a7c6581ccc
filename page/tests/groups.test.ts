import { describe, expect, it } from "vitest";
import { addToGroup, boxEdges, boxesOf, groupNodes, isPinned, renameGroup, togglePin, ungroup } from "../src/groups";
import { smallView } from "./builders";
import type { EditDocument } from "../src/types";

const empty = (): EditDocument => ({ labels: {}, pins: [], groups: [], layout: {} });
const view = smallView();
const find = (id: string) => view.nodes.find((node) => node.id === id) ?? null;

describe("boxEdges", () => {
  it("sums the edges between the nodes of two groups and compares them with the mass of the target's rows", () => {
    const document = empty();
    groupNodes(document, ["0/1/5", "0/1/6"], "low");
    groupNodes(document, ["1/2/7", "1/2/8"], "high");
    const boxes = boxesOf(document, find);
    expect(boxes.map((box) => box.name)).toEqual(["low", "high"]);
    expect(boxEdges(boxes, view.nodes, view.edges)).toEqual([{ source: 0, target: 1, weight: 5, share: 5 / 8 }]);
  });

  it("keeps the nodes of an expanded group apart", () => {
    const document = empty();
    groupNodes(document, ["0/1/5", "0/1/6"], "low");
    document.groups[0]!.collapsed = false;
    togglePin(document, "1/2/7");
    const edges = boxEdges(boxesOf(document, find), view.nodes, view.edges);
    expect(edges.map(({ weight, share }) => [weight, share])).toEqual([
      [3, 0.75],
      [-1, 0.25],
    ]);
  });
});

describe("edits of groups", () => {
  it("moves nodes between groups and drops a group of one", () => {
    const document = empty();
    groupNodes(document, ["0/1/5", "0/1/6"], "low");
    groupNodes(document, ["1/2/7", "1/2/8"], "low");
    expect(document.groups.map((group) => group.name)).toEqual(["low", "low 2"]);
    addToGroup(document, "low 2", ["0/1/5"]);
    expect(document.groups.map((group) => group.name)).toEqual(["low 2"]);
    expect(isPinned(document, "0/1/6")).toBe(true);
  });

  it("renames a group with its place and ungroups it", () => {
    const document = empty();
    groupNodes(document, ["0/1/5", "0/1/6"], "low");
    document.layout["low"] = [1, 2];
    renameGroup(document, "low", "Texas");
    expect(document.layout).toEqual({ Texas: [1, 2] });
    ungroup(document, "Texas");
    expect(document.pins).toEqual(["0/1/5", "0/1/6"]);
  });
});
