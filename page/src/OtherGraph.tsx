/** The graph that the open one is compared with, below it: the same thresholds, toggles and selection. */

import { effect } from "@preact/signals";
import { useEffect, useMemo } from "preact/hooks";
import { GraphView } from "./GraphView";
import { StoreContext, useStore } from "./context";
import { Store } from "./store";

const ignore = (): void => undefined;

export function OtherGraph({ name }: { name: string }) {
  const store = useStore();
  const other = useMemo(() => new Store(store.source, store.root, false), [store]);
  useEffect(() => {
    void other.open(name);
  }, [other, name]);
  useEffect(() => follow(store, other), [store, other]);
  return (
    <section class="subgraph" aria-label={`Graph B: ${name}`} data-testid="other-graph">
      <header class="subgraph-bar">
        <h2>B</h2>
        <span>{name}</span>
        <span class="prompt">{other.model.value?.view.prompt}</span>
      </header>
      <StoreContext.Provider value={other}>
        <GraphView onReady={ignore} />
      </StoreContext.Provider>
    </section>
  );
}

/** Let the other store show what the first does; a node that is pointed at in either is marked in both. */
function follow(store: Store, other: Store): () => void {
  const stops = [
    effect(() => {
      const { node, edge } = store.thresholds.value;
      if (other.graph.peek() !== null) other.prune(node, edge);
      else other.chooseThresholds(node, edge);
    }),
    effect(() => void (other.filter.value = store.filter.value)),
    effect(() => void (other.selected.value = store.selected.value)),
    effect(() => void (other.own.value = store.otherOwn.value)),
    effect(() => void (other.theme.value = store.theme.value)),
    effect(() => void (other.hovered.value = store.hovered.value)),
    effect(() => void (store.hovered.value = other.hovered.value)),
  ];
  return () => stops.forEach((stop) => stop());
}
