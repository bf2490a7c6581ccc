/** The selected node: its name, what it does here, its inputs and outputs, paths from it, and its card. */

import { useState } from "preact/hooks";
import { Icon } from "./Icon";
import { FeatureCard } from "./FeatureCard";
import { NodeName } from "./NodeName";
import { decimal, featureKey, nodeName, percent } from "./model";
import { isPinned, togglePin } from "./groups";
import { useStore } from "./context";
import type { GraphController } from "./graph_controller";
import type { Connection, GraphNode, StrongPath } from "./types";

export function NodePanel({ graph }: { graph: GraphController | null }) {
  const store = useStore();
  const detail = store.detail.value;
  if (!detail) return <Overview graph={graph} />;
  const { node } = detail;
  return (
    <div class="stack" data-testid="node-panel">
      <Heading key={node.id} node={node} />
      <Facts node={node} />
      <PathFinder node={node} />
      <div class="two">
        <Connections title="Inputs" list={detail.inputs} graph={graph} empty={emptyInputs(node)} />
        <Connections title="Outputs" list={detail.outputs} graph={graph} empty="It feeds nothing" />
      </div>
      {node.kind === "feature" && store.source.live && <FeatureCard key={node.id} node={node} />}
    </div>
  );
}

function emptyInputs(node: GraphNode): string {
  if (node.kind === "token") return "A token is where the graph begins";
  return node.kind === "error"
    ? "An error has no inputs"
    : "Its inputs were not traced; a larger max_features traces them";
}

/** What the panel shows while nothing is selected: where to begin. */
function Overview({ graph }: { graph: GraphController | null }) {
  const store = useStore();
  const view = store.model.value?.view;
  if (!view) return <p class="hint">Open a graph to see its nodes.</p>;
  const targets = view.nodes.filter((node) => node.kind === "target").sort((a, b) => (b.weight ?? 0) - (a.weight ?? 0));
  const features = view.nodes.filter((node) => node.kind === "feature").sort((a, b) => b.influence - a.influence);
  return (
    <div class="stack">
      <p class="hint">Click a node to see what feeds it and what it feeds. Ctrl-click pins it.</p>
      <h3>Predicted</h3>
      <ul class="connections">
        {targets.slice(0, 5).map((node) => (
          <Line
            key={node.id}
            node={node}
            share={node.weight ?? 0}
            sign={1}
            value={percent(node.weight)}
            graph={graph}
          />
        ))}
      </ul>
      <h3>Most influential features</h3>
      <ul class="connections">
        {features.slice(0, 12).map((node) => (
          <Line
            key={node.id}
            node={node}
            share={node.influence / Math.max(1e-12, features[0]!.influence)}
            sign={1}
            value={decimal(node.influence)}
            graph={graph}
          />
        ))}
      </ul>
    </div>
  );
}

function Heading({ node }: { node: GraphNode }) {
  const store = useStore();
  const [editing, setEditing] = useState(false);
  const labels = store.document.value.labels;
  const pinned = isPinned(store.document.value, node.id);
  const save = (text: string): void => {
    setEditing(false);
    const key = featureKey(node);
    const label = text.trim();
    if (label === (labels[key] ?? node.label)) return;
    store.change((document) => {
      document.labels = Object.fromEntries(Object.entries(document.labels).filter(([other]) => other !== key));
      if (label) document.labels[key] = label;
    });
  };
  return (
    <div class="heading">
      <span class={`shape large ${node.kind}`} aria-hidden="true" />
      {editing ? (
        <input
          class="rename"
          aria-label="Label"
          value={labels[featureKey(node)] ?? node.label}
          ref={(input) => input?.focus()}
          onBlur={(event) => save(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter") event.currentTarget.blur();
            if (event.key === "Escape") setEditing(false);
          }}
        />
      ) : (
        <h2>
          {node.kind === "feature" ? (
            <button class="plain" data-key="r" title="Rename (R)" onClick={() => setEditing(true)}>
              {nodeName(node, labels)}
            </button>
          ) : (
            nodeName(node, labels)
          )}
        </h2>
      )}
      <span class="mono">{node.id}</span>
      <button
        class="small"
        aria-pressed={pinned}
        title={pinned ? "Take it out of the subgraph (P)" : "Put it into the subgraph (P)"}
        onClick={() => store.change((document) => togglePin(document, node.id))}
      >
        <Icon name="pin" /> {pinned ? "Pinned" : "Pin"}
      </button>
    </div>
  );
}

function Facts({ node }: { node: GraphNode }) {
  const store = useStore();
  const token = store.model.value?.view.tokens[node.position];
  const automatic = node.kind === "feature" && node.automatic && !store.document.value.labels[featureKey(node)];
  return (
    <dl class="facts">
      {node.kind === "target" && <Fact name="probability" value={percent(node.weight, 1)} />}
      {node.kind !== "target" && <Fact name="influence" value={decimal(node.influence)} />}
      {node.value !== null && <Fact name="activation" value={decimal(node.value)} />}
      {(node.kind === "feature" || node.kind === "error") && <Fact name="layer" value={String(node.layer)} />}
      {token !== undefined && <Fact name={`position ${node.position}`} value={`“${token.trim() || token}”`} />}
      {node.density !== null && <Fact name="density" value={percent(node.density, 2)} />}
      {automatic && <Fact name="label" value="automatic" />}
    </dl>
  );
}

function Fact({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

interface ConnectionsProps {
  title: string;
  list: Connection[];
  graph: GraphController | null;
  empty: string;
}

const FIRST = 12;

function Connections({ title, list, graph, empty }: ConnectionsProps) {
  const store = useStore();
  const [all, setAll] = useState(false);
  const { errors, tokens, positive, negative } = store.filter.value;
  const shown = list.filter(
    ({ node, weight }) =>
      (errors || node.kind !== "error") && (tokens || node.kind !== "token") && (weight < 0 ? negative : positive),
  );
  const strongest = Math.max(1e-12, ...shown.map((connection) => connection.share));
  return (
    <section aria-label={title}>
      <h3>{title}</h3>
      {shown.length === 0 && <p class="hint">{list.length ? "Hidden by the toggles" : empty}</p>}
      <ul class="connections" data-testid={title.toLowerCase()}>
        {shown.slice(0, all ? undefined : FIRST).map(({ node, weight, share }) => (
          <Line
            key={node.id}
            node={node}
            share={share / strongest}
            sign={Math.sign(weight)}
            value={percent(share)}
            title={`weight ${decimal(weight)}`}
            graph={graph}
          />
        ))}
      </ul>
      {shown.length > FIRST && (
        <button class="plain more" onClick={() => setAll(!all)}>
          {all ? "Fewer" : `${shown.length - FIRST} more`}
        </button>
      )}
    </section>
  );
}

interface LineProps {
  node: GraphNode;
  /** Length of the bar, 0 to 1. */
  share: number;
  sign: number;
  value: string;
  title?: string;
  graph: GraphController | null;
}

function Line({ node, share, sign, value, title, graph }: LineProps) {
  const store = useStore();
  const choose = (event: MouseEvent): void => {
    if (event.ctrlKey || event.metaKey) store.change((document) => togglePin(document, node.id));
    else {
      store.select(node.id);
      graph?.reveal(node.id);
    }
  };
  return (
    <li>
      <button
        class={`line ${sign < 0 ? "negative" : "positive"}`}
        title={title}
        onClick={choose}
        onMouseEnter={() => (store.hovered.value = node.id)}
        onMouseLeave={() => (store.hovered.value = null)}
        onFocus={() => (store.hovered.value = node.id)}
        onBlur={() => (store.hovered.value = null)}
      >
        <span class="meter" style={{ width: `${Math.min(100, 100 * share)}%` }} />
        <NodeName node={node} />
        <span class="value">
          {sign < 0 && !value.startsWith("<") ? "−" : ""}
          {value}
        </span>
      </button>
    </li>
  );
}

function PathFinder({ node }: { node: GraphNode }) {
  const store = useStore();
  const { from, to } = store.pathEnds.value;
  const paths = store.paths.value;
  const set = (side: "from" | "to"): void => {
    const other = side === "from" ? to : from;
    const ends = { from, to, [side]: node.id };
    if (other === node.id) ends[side === "from" ? "to" : "from"] = null;
    store.pathEnds.value = ends;
  };
  return (
    <section class="paths" aria-label="Strongest paths">
      <div class="row">
        <button
          class="small"
          aria-pressed={from === node.id}
          data-key="["
          title="Paths from this node ([)"
          onClick={() => set("from")}
        >
          Paths from
        </button>
        <button
          class="small"
          aria-pressed={to === node.id}
          data-key="]"
          title="Paths to this node (])"
          onClick={() => set("to")}
        >
          Paths to
        </button>
        {(from !== null || to !== null) && (
          <button class="small quiet" onClick={() => (store.pathEnds.value = { from: null, to: null })}>
            Clear
          </button>
        )}
      </div>
      {(from !== null) !== (to !== null) && (
        <p class="hint">
          {from === null
            ? "Select where the paths begin and press “Paths from”."
            : "Select where the paths end and press “Paths to”."}
        </p>
      )}
      {paths?.length === 0 && <p class="hint">No path joins these nodes.</p>}
      {paths && paths.length > 0 && (
        <ol data-testid="paths">
          {paths.map((path, i) => (
            <PathLine key={i} path={path} />
          ))}
        </ol>
      )}
    </section>
  );
}

function PathLine({ path }: { path: StrongPath }) {
  const store = useStore();
  const labels = store.document.value.labels;
  return (
    <li>
      <span class={path.sign < 0 ? "sign negative" : "sign positive"} title={path.sign < 0 ? "lowers" : "raises"}>
        {path.sign < 0 ? "−" : "+"}
      </span>
      {path.nodes.map((node, i) => (
        <>
          {i > 0 && <span class="arrow">→</span>}
          <button class="plain" title={node.id} onClick={() => store.select(node.id)}>
            {nodeName(node, labels)}
          </button>
        </>
      ))}
      <span class="value">{percent(path.strength)}</span>
    </li>
  );
}
