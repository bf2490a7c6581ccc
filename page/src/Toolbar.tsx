/** Thresholds, toggles and zoom above the graph. */

import { useMemo } from "preact/hooks";
import { Action } from "./Header";
import { percent } from "./model";
import { useStore } from "./context";
import type { GraphController } from "./graph_controller";
import type { Filter } from "./model";

export function Toolbar({ graph }: { graph: GraphController | null }) {
  const store = useStore();
  const model = store.model.value;
  const { node, edge } = store.thresholds.value;
  const dense = model?.view.nodes.some((candidate) => candidate.density !== null) ?? false;
  if (!model) return <div class="toolbar" />;
  return (
    <div class="toolbar" role="toolbar" aria-label="What the graph shows">
      <Slider
        name="Nodes"
        value={node}
        set={(value) => store.prune(value, edge)}
        title="Share of influence that the nodes carry"
      />
      <Slider
        name="Edges"
        value={edge}
        set={(value) => store.prune(node, value)}
        title="Share of influence that the edges carry"
      />
      {dense && (
        <Slider
          name="Density"
          value={store.filter.value.density}
          set={(density) => (store.filter.value = { ...store.filter.value, density })}
          title="Hide features that are active on more than this share of tokens"
        />
      )}
      <div class="toggles" role="group" aria-label="Show">
        <Toggle name="errors" text="Errors" keys="E" mark="error" />
        <Toggle name="tokens" text="Tokens" keys="T" mark="token" />
        <Toggle name="positive" text="Raise" keys="+" mark="positive" />
        <Toggle name="negative" text="Lower" keys="−" mark="negative" />
      </div>
      <Counts />
      <div class="zooms">
        <Action icon="minus" name="Zoom out" keys="O" act={() => graph?.zoom(1 / 1.3)} />
        <Action icon="plus" name="Zoom in" keys="I" act={() => graph?.zoom(1.3)} />
        <Action icon="fit" name="Fit" keys="0" act={() => graph?.fit()} />
        <Action icon="list" name="List of nodes" keys="L" act={() => (store.dialog.value = "list")} />
      </div>
    </div>
  );
}

function Counts() {
  const store = useStore();
  const model = store.model.value!;
  const view = model.view;
  const visible = useMemo(() => model.visible(store.filter.value), [model, store.filter.value]);
  const features = view.nodes.filter((node, i) => node.kind === "feature" && visible[i]).length;
  const edges = useMemo(() => model.visibleEdges(store.filter.value, visible).length, [model, visible]);
  const { replacement, completeness } = view.scores;
  const law =
    view.certificate === null
      ? ""
      : `\nEdges and bias add up to every input within ${view.certificate.toExponential(0)}`;
  return (
    <span
      class="counts"
      data-testid="counts"
      title={`Replacement ${percent(replacement)}, completeness ${percent(completeness)} of the complete graph${law}`}
    >
      <b>{features.toLocaleString("en")}</b> of {view.total.features.toLocaleString("en")} features ·{" "}
      <b>{edges.toLocaleString("en")}</b> edges
    </span>
  );
}

interface SliderProps {
  name: string;
  value: number;
  set: (value: number) => void;
  title: string;
}

function Slider({ name, value, set, title }: SliderProps) {
  return (
    <label class="slider" title={title}>
      <span>{name}</span>
      <input
        type="range"
        min="0"
        max="1"
        step="0.01"
        value={value}
        aria-label={`${name}: ${title}`}
        aria-valuetext={percent(value)}
        onInput={(event) => set(Number(event.currentTarget.value))}
      />
      <output>{percent(value)}</output>
    </label>
  );
}

type Shown = Exclude<keyof Filter, "density">;

function Toggle({ name, text, keys, mark }: { name: Shown; text: string; keys: string; mark: string }) {
  const store = useStore();
  const on = store.filter.value[name];
  const nodes = store.model.value?.view.nodes ?? [];
  const hidden = name === "errors" && !on ? nodes.filter((node) => node.kind === "error").length : 0;
  return (
    <button
      class="toggle"
      aria-pressed={on}
      title={`${on ? "Hide" : "Show"} ${text.toLowerCase()} (${keys})`}
      onClick={() => store.toggle(name)}
    >
      <span class={`shape ${mark}`} aria-hidden="true" />
      {text}
      {hidden > 0 && <span class="quantity">{hidden.toLocaleString("en")}</span>}
    </button>
  );
}
