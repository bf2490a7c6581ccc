/** The page: header, graph, subgraph and panels. */

import { useCallback, useEffect, useState } from "preact/hooks";
import { StoreContext, useStore } from "./context";
import { GraphView } from "./GraphView";
import type { GraphController } from "./graph_controller";
import { Header } from "./Header";
import { listenToKeys } from "./keys";
import { NodePanel } from "./NodePanel";
import { ComparePanel } from "./ComparePanel";
import { IntervenePanel } from "./IntervenePanel";
import { Dialogs } from "./Dialogs";
import { OtherGraph } from "./OtherGraph";
import { Subgraph } from "./Subgraph";
import { Toolbar } from "./Toolbar";
import { TracePanel } from "./TracePanel";
import type { Store } from "./store";
import type { Tab } from "./url";

const DARK = "(prefers-color-scheme: dark)";

export function App({ store }: { store: Store }) {
  return (
    <StoreContext.Provider value={store}>
      <Page />
    </StoreContext.Provider>
  );
}

function Page() {
  const store = useStore();
  const [graph, setGraph] = useState<GraphController | null>(null);
  const onReady = useCallback((controller: GraphController) => setGraph(controller), []);
  useEffect(() => (graph ? listenToKeys(store, graph) : undefined), [store, graph]);
  const notice = store.notice.value;
  const systemIsDark = useSystemIsDark();
  const theme = store.theme.value === "auto" ? (systemIsDark ? "dark" : "light") : store.theme.value;
  return (
    <div class="page" data-theme={theme} data-tab={store.tab.value}>
      <Header />
      <main class="work">
        <section class="graph-side" aria-label="Graph">
          <Toolbar graph={graph} />
          <GraphView onReady={onReady} />
          <Empty />
        </section>
        <Lower />
        <Panels graph={graph} />
      </main>
      <Dialogs graph={graph} />
      <div class="notices" role="status" aria-live="polite">
        {notice && <div class={notice.error ? "notice error" : "notice"}>{notice.text}</div>}
      </div>
    </div>
  );
}

function useSystemIsDark(): boolean {
  const [dark, setDark] = useState(() => matchMedia(DARK).matches);
  useEffect(() => {
    const query = matchMedia(DARK);
    const update = (): void => setDark(query.matches);
    query.addEventListener("change", update);
    return () => query.removeEventListener("change", update);
  }, []);
  return dark;
}

/** Below the graph: the subgraph, or the graph that it is compared with. */
function Lower() {
  const store = useStore();
  const other = store.other.value;
  return store.tab.value === "compare" && other !== null && store.source.live ? (
    <OtherGraph name={other} />
  ) : (
    <Subgraph />
  );
}

/** What stands in the graph's place while there is none. */
function Empty() {
  const store = useStore();
  if (store.model.value) return null;
  if (store.failure.value)
    return (
      <div class="empty" role="alert">
        <h2>This graph does not open</h2>
        <p>{store.failure.value}</p>
      </div>
    );
  if (store.graph.value !== null || store.server.value === null) return <div class="empty">Reading…</div>;
  return (
    <div class="empty">
      <h2>No graph yet</h2>
      {store.serverModel.value ? (
        <p>Type a prompt on the right to trace {store.serverModel.value.name}.</p>
      ) : (
        <p>
          This folder holds no graphs. Write one with <code>pycircuit attribute</code> or <code>graph.save</code>.
        </p>
      )}
    </div>
  );
}

const NAMES: Record<Tab, string> = {
  node: "Node",
  subgraph: "Subgraph",
  intervene: "Intervene",
  compare: "Compare",
  trace: "Trace",
};

/** Tabs that this page has: those that need a model or a server only with one. */
function tabsOf(store: Store): Tab[] {
  const tabs: Tab[] = ["node"];
  if (store.serverModel.value?.can_intervene) tabs.push("intervene");
  if (store.source.live && (store.server.value?.graphs.length ?? 0) > 1) tabs.push("compare");
  if (store.serverModel.value?.can_trace) tabs.push("trace");
  return tabs;
}

function Panels({ graph }: { graph: GraphController | null }) {
  const store = useStore();
  const tabs = tabsOf(store);
  const wanted = store.tab.value;
  const tab = wanted === "subgraph" || !tabs.includes(wanted) ? "node" : wanted;
  return (
    <aside class="panels" aria-label="Panels">
      <div class="tabs" role="tablist">
        <TabButton tab="subgraph" current={wanted === "subgraph"} narrowOnly />
        {tabs.map((name) => (
          <TabButton key={name} tab={name} current={wanted !== "subgraph" && name === tab} />
        ))}
      </div>
      <div class="panel" role="tabpanel" id="panel" aria-label={NAMES[tab]}>
        {tab === "node" && <NodePanel graph={graph} />}
        {tab === "intervene" && <IntervenePanel />}
        {tab === "compare" && <ComparePanel />}
        {tab === "trace" && <TracePanel />}
      </div>
    </aside>
  );
}

function TabButton({ tab, current, narrowOnly }: { tab: Tab; current: boolean; narrowOnly?: boolean }) {
  const store = useStore();
  return (
    <button
      role="tab"
      class={narrowOnly ? "narrow-only" : ""}
      aria-selected={current}
      aria-controls="panel"
      onClick={() => store.show(tab)}
    >
      {NAMES[tab]}
    </button>
  );
}
