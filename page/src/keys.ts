/** What the keyboard does; the help sheet shows the same table. */

import { groupOf, isPinned, groupNodes, togglePin, ungroup } from "./groups";
import { nodeName } from "./model";
import { nextNode, type Step } from "./walk";
import type { GraphController } from "./graph_controller";
import type { Store } from "./store";
import type { Tab } from "./url";

export interface KeyAction {
  keys: string[];
  shown: string;
  text: string;
  section: "Walk" | "Show" | "Subgraph" | "Page";
  act: (store: Store, graph: GraphController) => void;
}

const walk = (step: Step) => (store: Store, graph: GraphController) => {
  if (!graph.scene) return;
  const { model, layout } = graph.scene;
  const from = store.selected.value === null ? -1 : (model.byId.get(store.selected.value) ?? -1);
  const next = nextNode(model, layout, from, step);
  if (next < 0) return;
  const id = model.view.nodes[next]!.id;
  store.select(id);
  graph.reveal(id);
};

const toggle = (name: "errors" | "tokens" | "positive" | "negative") => (store: Store) => store.toggle(name);

const nudge = (node: number, edge: number) => (store: Store) => {
  const inside = (value: number): number => Math.round(100 * Math.min(1, Math.max(0, value))) / 100;
  const now = store.thresholds.value;
  store.prune(inside(now.node + node), inside(now.edge + edge));
};

const tab = (name: Tab) => (store: Store) => store.show(name);

/** Press the control of the page that has this key as `data-key`. */
const press = (key: string) => (store: Store) => {
  const control = store.root.querySelector<HTMLElement>(`[data-key="${key}"]`);
  if (control instanceof HTMLInputElement) control.focus();
  else control?.click();
};

function choose(store: Store): void {
  const id = store.selected.value;
  if (id === null) return;
  const chosen = store.chosen.value;
  store.chosen.value = chosen.includes(id) ? chosen.filter((other) => other !== id) : [...chosen, id];
  store.say(`${store.chosen.value.length} chosen; G groups them`);
}

/** Group the chosen nodes, or everything that is pinned and ungrouped where nothing is chosen. */
export function groupChosen(store: Store): void {
  const document = store.document.value;
  const chosen = store.chosen.value;
  const loose = document.pins.filter((id) => !groupOf(document, id));
  const ids = chosen.length > 0 ? chosen : loose;
  if (ids.length < 2) return store.say("Choose two nodes or more: Shift-click, or X at each");
  const first = store.model.value?.node(ids[0]!);
  const name = first ? nodeName(first, document.labels) : "group";
  store.change((edited) => void groupNodes(edited, ids, name));
  store.chosen.value = [];
  store.say(`Grouped ${ids.length} nodes as “${name}”`);
}

function ungroupSelected(store: Store): void {
  const id = store.selected.value;
  const group = id === null ? null : groupOf(store.document.value, id);
  if (group) store.change((document) => ungroup(document, group.name));
}

function pinSelected(store: Store): void {
  const ids =
    store.chosen.value.length > 0 ? store.chosen.value : store.selected.value === null ? [] : [store.selected.value];
  if (ids.length === 0) return;
  const all = ids.every((id) => isPinned(store.document.value, id));
  store.change((document) =>
    ids.forEach((id) => {
      if (isPinned(document, id) === all) togglePin(document, id);
    }),
  );
  store.say(all ? "Unpinned" : "Pinned");
}

function escape(store: Store): void {
  if (store.dialog.value) store.dialog.value = null;
  else if (store.chosen.value.length) store.chosen.value = [];
  else if (store.paths.value ?? store.pathEnds.value.from ?? store.pathEnds.value.to)
    store.pathEnds.value = { from: null, to: null };
  else store.select(null);
}

function cycleTheme(store: Store): void {
  const dark =
    store.theme.value === "dark" ||
    (store.theme.value === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  store.theme.value = dark ? "light" : "dark";
}

export const KEYS: KeyAction[] = [
  { keys: ["ArrowUp"], shown: "↑", text: "Along the strongest output", section: "Walk", act: walk("up") },
  { keys: ["ArrowDown"], shown: "↓", text: "Along the strongest input", section: "Walk", act: walk("down") },
  { keys: ["ArrowLeft"], shown: "←", text: "The node to the left", section: "Walk", act: walk("left") },
  { keys: ["ArrowRight"], shown: "→", text: "The node to the right", section: "Walk", act: walk("right") },
  { keys: ["/"], shown: "/", text: "Search", section: "Walk", act: press("/") },
  { keys: ["["], shown: "[", text: "Paths from this node", section: "Walk", act: press("[") },
  { keys: ["]"], shown: "]", text: "Paths to this node", section: "Walk", act: press("]") },
  {
    keys: ["l"],
    shown: "L",
    text: "List of all nodes",
    section: "Walk",
    act: (store) => (store.dialog.value = "list"),
  },
  { keys: ["Escape"], shown: "Esc", text: "Close, clear, deselect", section: "Walk", act: escape },
  { keys: ["e"], shown: "E", text: "Errors", section: "Show", act: toggle("errors") },
  { keys: ["t"], shown: "T", text: "Tokens", section: "Show", act: toggle("tokens") },
  { keys: ["+", "="], shown: "+", text: "Edges that raise", section: "Show", act: toggle("positive") },
  { keys: ["-"], shown: "−", text: "Edges that lower", section: "Show", act: toggle("negative") },
  { keys: [","], shown: ",", text: "Fewer nodes", section: "Show", act: nudge(-0.05, 0) },
  { keys: ["."], shown: ".", text: "More nodes", section: "Show", act: nudge(0.05, 0) },
  { keys: ["<"], shown: "<", text: "Fewer edges", section: "Show", act: nudge(0, -0.02) },
  { keys: [">"], shown: ">", text: "More edges", section: "Show", act: nudge(0, 0.02) },
  { keys: ["i"], shown: "I", text: "Zoom in", section: "Show", act: (_, graph) => graph.zoom(1.3) },
  { keys: ["o"], shown: "O", text: "Zoom out", section: "Show", act: (_, graph) => graph.zoom(1 / 1.3) },
  { keys: ["0"], shown: "0", text: "Fit the graph", section: "Show", act: (_, graph) => graph.fit() },
  { keys: ["p"], shown: "P", text: "Pin or unpin", section: "Subgraph", act: pinSelected },
  { keys: ["x"], shown: "X", text: "Choose for a group", section: "Subgraph", act: choose },
  { keys: ["g"], shown: "G", text: "Group the chosen nodes", section: "Subgraph", act: groupChosen },
  { keys: ["u"], shown: "U", text: "Ungroup the node’s group", section: "Subgraph", act: ungroupSelected },
  { keys: ["r"], shown: "R", text: "Rename the feature", section: "Subgraph", act: press("r") },
  { keys: ["f"], shown: "F", text: "Group for me", section: "Subgraph", act: press("f") },
  { keys: ["z"], shown: "Z", text: "Undo", section: "Page", act: (store) => store.undo() },
  { keys: ["Z", "y"], shown: "⇧Z", text: "Redo", section: "Page", act: (store) => store.redo() },
  { keys: ["1"], shown: "1", text: "Node", section: "Page", act: tab("node") },
  { keys: ["2"], shown: "2", text: "Intervene", section: "Page", act: tab("intervene") },
  { keys: ["3"], shown: "3", text: "Compare", section: "Page", act: tab("compare") },
  { keys: ["4"], shown: "4", text: "Trace", section: "Page", act: tab("trace") },
  { keys: ["c"], shown: "C", text: "Copy the link", section: "Page", act: press("c") },
  { keys: ["s"], shown: "S", text: "Export", section: "Page", act: press("s") },
  { keys: ["d"], shown: "D", text: "Dark or light", section: "Page", act: cycleTheme },
  { keys: ["?"], shown: "?", text: "This sheet", section: "Page", act: (store) => (store.dialog.value = "help") },
];

export function listenToKeys(store: Store, graph: GraphController): () => void {
  const listener = (event: KeyboardEvent): void => {
    const target = event.target;
    const writing = target instanceof HTMLElement && target.matches("input:not([type=range]), textarea, select");
    if (event.altKey || event.defaultPrevented || (writing && event.key !== "Escape")) return;
    if (writing) return;
    const command = event.ctrlKey || event.metaKey;
    if (command && !["z", "Z", "y"].includes(event.key)) return;
    if (store.dialog.value && event.key !== "Escape") return;
    const arrows = event.key.startsWith("Arrow");
    if (arrows && target instanceof HTMLElement && target.matches("input, [role=option], [role=tab]")) return;
    const action = KEYS.find((candidate) => candidate.keys.includes(event.key));
    if (!action) return;
    event.preventDefault();
    action.act(store, graph);
  };
  const element = store.root.classList.contains("pycircuit-full") ? window : store.root;
  element.addEventListener("keydown", listener as EventListener);
  return () => element.removeEventListener("keydown", listener as EventListener);
}
