/** The address of a view: what is shown and selected, in the fragment of the page's address. */

import { SHOW_ALL, type Filter } from "./model";

export type Tab = "node" | "subgraph" | "intervene" | "compare" | "trace";
/** What makes nodes of two graphs the same. */
export type Alignment = "position" | "feature" | "label";
export type Theme = "auto" | "light" | "dark";

export interface Address {
  graph: string | null;
  /** The thresholds; null: those at which the graph can be read. */
  node: number | null;
  edge: number | null;
  selected: string | null;
  tab: Tab;
  filter: Filter;
  pathFrom: string | null;
  pathTo: string | null;
  other: string | null;
  align: Alignment;
  camera: [number, number, number] | null;
  /** Edits of a page without a server, as JSON. */
  edits: string | null;
}

export const NEW_ADDRESS: Address = {
  graph: null,
  node: null,
  edge: null,
  selected: null,
  tab: "node",
  filter: SHOW_ALL,
  pathFrom: null,
  pathTo: null,
  other: null,
  align: "position",
  camera: null,
  edits: null,
};

const ALIGNMENTS: readonly Alignment[] = ["position", "feature", "label"];
const TABS: readonly Tab[] = ["node", "subgraph", "intervene", "compare", "trace"];
const HIDEABLE = ["errors", "tokens", "positive", "negative"] as const;

export function writeAddress(address: Address): string {
  const query = new URLSearchParams();
  const set = (key: string, value: string | null, usual: string | null = null): void => {
    if (value !== null && value !== usual) query.set(key, value);
  };
  set("g", address.graph);
  set("n", address.node === null ? null : String(address.node));
  set("e", address.edge === null ? null : String(address.edge));
  set("s", address.selected);
  set("tab", address.tab, NEW_ADDRESS.tab);
  set("hide", HIDEABLE.filter((name) => !address.filter[name]).join(","), "");
  set("density", String(address.filter.density), "1");
  set("from", address.pathFrom);
  set("to", address.pathTo);
  set("with", address.other);
  set("align", address.align, NEW_ADDRESS.align);
  set("at", address.camera ? address.camera.map((value) => Number(value.toPrecision(5))).join(",") : null);
  set("edits", address.edits);
  return query.toString().replaceAll("%2F", "/").replaceAll("%2C", ",");
}

export function readAddress(fragment: string): Address {
  const query = new URLSearchParams(fragment.replace(/^#/, ""));
  const hidden = new Set((query.get("hide") ?? "").split(","));
  const tab = query.get("tab") as Tab | null;
  return {
    graph: query.get("g"),
    node: share(query.get("n"), null),
    edge: share(query.get("e"), null),
    selected: query.get("s"),
    tab: tab !== null && TABS.includes(tab) ? tab : NEW_ADDRESS.tab,
    filter: {
      errors: !hidden.has("errors"),
      tokens: !hidden.has("tokens"),
      positive: !hidden.has("positive"),
      negative: !hidden.has("negative"),
      density: share(query.get("density"), 1),
    },
    pathFrom: query.get("from"),
    pathTo: query.get("to"),
    other: query.get("with"),
    align: alignmentOf(query.get("align")),
    camera: cameraOf(query.get("at")),
    edits: query.get("edits"),
  };
}

export function alignmentOf(text: string | null): Alignment {
  return ALIGNMENTS.find((name) => name === text) ?? NEW_ADDRESS.align;
}

function share<T>(text: string | null, usual: T): number | T {
  const value = text === null ? Number.NaN : Number(text);
  return value >= 0 && value <= 1 ? value : usual;
}

function cameraOf(text: string | null): [number, number, number] | null {
  const values = (text ?? "").split(",").map(Number);
  const [k, x, y] = values;
  if (values.length !== 3 || !values.every(Number.isFinite)) return null;
  return k! > 0 ? [k!, x!, y!] : null;
}
