/** The subgraph: pinned nodes and supernodes, with their scores, moved and grouped by hand. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Icon } from "./Icon";
import { SubgraphDrawing } from "./SubgraphDrawing";
import { boxEdges, boxesOf, renameGroup, ungroup, unpin, groupNodes } from "./groups";
import { groupChosen } from "./keys";
import { groupColour } from "./palette";
import { percent } from "./model";
import { useStore } from "./context";
import type { Store } from "./store";
import type { Edges, GraphNode, Group, Scores } from "./types";

const FIRST_FEATURES = 40; // grouped by "group for me" where nothing is pinned

/** Every pinned node and every node of a group. */
export function members(store: Store): string[] {
  const document = store.document.value;
  return [...new Set([...document.pins, ...document.groups.flatMap((group) => group.nodes)])];
}

export function Subgraph() {
  const store = useStore();
  const [scores, setScores] = useState<Scores | null>(null);
  const [pinned, setPinned] = useState<Edges | null>(null);
  const [current, setCurrent] = useState<string | null>(null);
  const ids = members(store);
  const key = ids.join(" ");
  const graph = store.graph.value;
  useEffect(() => {
    if (graph === null || key === "") {
      setScores(null);
      setPinned(null);
      return undefined;
    }
    let open = true;
    const timer = window.setTimeout(() => {
      const nodes = key.split(" ");
      const report = (error: unknown): void => store.report(error);
      store.source.edges(graph, nodes).then((answer) => open && setPinned(answer), report);
      store.source.scores(graph, nodes).then((answer) => open && setScores(answer), report);
    }, 60);
    return () => {
      open = false;
      window.clearTimeout(timer);
    };
  }, [store, graph, key]);
  if (!store.model.value) return <section class="subgraph" aria-label="Subgraph" />;
  return (
    <section class={`subgraph${ids.length === 0 ? " without-pins" : ""}`} aria-label="Subgraph" data-testid="subgraph">
      <SubgraphBar scores={scores} current={current} setCurrent={setCurrent} />
      {ids.length > 0 && <Drawing pinned={pinned} current={current} setCurrent={setCurrent} />}
    </section>
  );
}

function NoPins() {
  return (
    <p class="hint no-pins">
      Pin nodes to build it: Ctrl-click or <kbd>P</kbd>; <kbd>X</kbd> chooses several, <kbd>G</kbd> groups them.
    </p>
  );
}

interface DrawingProps {
  pinned: Edges | null;
  current: string | null;
  setCurrent: (id: string | null) => void;
}

interface CurrentProps {
  scores: Scores | null;
  current: string | null;
  setCurrent: (id: string | null) => void;
}

function Drawing({ pinned, current, setCurrent }: DrawingProps) {
  const store = useStore();
  const document = store.document.value;
  const boxes = useMemo(() => {
    const byId = new Map((pinned?.nodes ?? []).map((node) => [node.id, node]));
    const find = (id: string): GraphNode | null => byId.get(id) ?? store.model.value?.node(id) ?? null;
    return boxesOf(document, find);
  }, [document, pinned, store.model.value]);
  const edges = useMemo(() => (pinned ? boxEdges(boxes, pinned.nodes, pinned.edges) : []), [boxes, pinned]);
  return <SubgraphDrawing boxes={boxes} edges={edges} current={current} setCurrent={setCurrent} />;
}

function SubgraphBar({ scores, current, setCurrent }: CurrentProps) {
  const store = useStore();
  const document = store.document.value;
  const group = document.groups.find((candidate) => candidate.name === current) ?? null;
  const several = store.chosen.value.length;
  return (
    <header class="subgraph-bar">
      <h2>Subgraph</h2>
      {members(store).length === 0 && <NoPins />}
      {scores && <ScoreMeters scores={scores} />}
      <div class="row">
        {several > 1 && (
          <button class="small primary" onClick={() => groupChosen(store)}>
            <Icon name="group" /> Group {several}
          </button>
        )}
        {group && <GroupTools key={group.name} group={group} setCurrent={setCurrent} />}
        {store.source.live && (
          <button
            class="small"
            data-key="f"
            title="Group features that read and write alike (F)"
            onClick={() => void groupForMe(store)}
          >
            <Icon name="wand" /> Group for me
          </button>
        )}
        {members(store).length > 0 && (
          <>
            {Object.keys(document.layout).length > 0 && (
              <button class="small quiet" onClick={() => store.change((edited) => void (edited.layout = {}))}>
                Tidy
              </button>
            )}
            <button
              class="small quiet"
              onClick={() => {
                store.change((edited) => Object.assign(edited, { pins: [], groups: [], layout: {} }));
                store.say("Cleared; Z brings it back");
              }}
            >
              Clear
            </button>
          </>
        )}
      </div>
    </header>
  );
}

function ScoreMeters({ scores }: { scores: Scores }) {
  if (scores.replacement === null && scores.completeness === null) return null;
  return (
    <dl class="scores" data-testid="scores">
      <Meter
        name="Replacement"
        value={scores.replacement}
        title="Of the influence that begins at tokens or errors, the share that begins at tokens"
      />
      <Meter
        name="Completeness"
        value={scores.completeness}
        title="Share of the nodes’ inputs that the subgraph explains"
      />
    </dl>
  );
}

function Meter({ name, value, title }: { name: string; value: number | null; title: string }) {
  return (
    <div title={title}>
      <dt>{name}</dt>
      <dd>
        <meter min={0} max={1} value={value ?? 0} aria-label={name} />
        {percent(value)}
      </dd>
    </div>
  );
}

function GroupTools({ group, setCurrent }: { group: Group; setCurrent: (id: string | null) => void }) {
  const store = useStore();
  const input = useRef<HTMLInputElement>(null);
  const index = store.document.value.groups.indexOf(group);
  const rename = (text: string): void => {
    if (text.trim() === "" || text === group.name) return;
    let name = group.name;
    store.change((document) => (name = renameGroup(document, group.name, text.trim())));
    setCurrent(name);
  };
  const flip = (): void =>
    store.change((document) => {
      const edited = document.groups.find((candidate) => candidate.name === group.name);
      if (edited) edited.collapsed = !edited.collapsed;
    });
  return (
    <span class="group-tools">
      <span class="dot" style={{ background: groupColour(index) }} aria-hidden="true" />
      <input
        ref={input}
        aria-label="Name of the group"
        value={group.name}
        onChange={(event) => rename(event.currentTarget.value)}
        onKeyDown={(event) => event.key === "Enter" && event.currentTarget.blur()}
      />
      <button class="small" aria-expanded={!group.collapsed} onClick={flip}>
        {group.collapsed ? "Expand" : "Collapse"}
      </button>
      <button class="small" onClick={() => store.change((document) => ungroup(document, group.name))}>
        <Icon name="ungroup" /> Ungroup
      </button>
      <button class="small quiet" onClick={() => store.change((document) => unpin(document, [...group.nodes]))}>
        Unpin
      </button>
    </span>
  );
}

/** Group the pinned features, or the most influential ones of the graph; groups made by hand stay as they are. */
export async function groupForMe(store: Store): Promise<void> {
  const graph = store.graph.value;
  const model = store.model.value;
  if (graph === null || !model) return;
  const document = store.document.value;
  const pinned = members(store).filter((id) => model.node(id)?.kind !== "token" && model.node(id)?.kind !== "target");
  const strongest = model.view.nodes
    .filter((node) => node.kind === "feature")
    .sort((a, b) => b.influence - a.influence)
    .slice(0, FIRST_FEATURES)
    .map((node) => node.id);
  const nodes = pinned.length >= 2 ? pinned : strongest;
  const fixed = Object.fromEntries(document.groups.map((group) => [group.name, group.nodes]));
  try {
    const groups = await store.source.group(graph, nodes, fixed);
    const ends = model.view.nodes.filter(
      (node) => node.kind === "target" || (node.kind === "token" && node.position > 0),
    );
    store.change((edited) => {
      for (const end of pinned.length >= 2 ? [] : strongestEnds(ends))
        if (!edited.pins.includes(end)) edited.pins.push(end);
      for (const group of groups)
        if (!(group.name in fixed) && group.nodes.length >= 2) groupNodes(edited, group.nodes, group.name);
      for (const id of nodes) if (!edited.pins.includes(id)) edited.pins.push(id);
    });
    store.say(`${groups.length} groups`);
  } catch (error) {
    store.report(error);
  }
}

/** The best target and the tokens that matter most. */
function strongestEnds(ends: GraphNode[]): string[] {
  const targets = ends.filter((node) => node.kind === "target").sort((a, b) => (b.weight ?? 0) - (a.weight ?? 0));
  const tokens = ends.filter((node) => node.kind === "token").sort((a, b) => b.influence - a.influence);
  return [...targets.slice(0, 1), ...tokens.slice(0, 4)].map((node) => node.id);
}
