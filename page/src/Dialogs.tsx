/** Sheets over the page: the keyboard, the list of nodes, and the import of a link. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { Action } from "./Header";
import { KEYS } from "./keys";
import { NodeName } from "./NodeName";
import { decimal } from "./model";
import { useStore } from "./context";
import type { GraphController } from "./graph_controller";
import type { GraphNode } from "./types";

export function Dialogs({ graph }: { graph: GraphController | null }) {
  const store = useStore();
  const open = store.dialog.value;
  if (open === "help") return <Help />;
  if (open === "list") return <NodeList graph={graph} />;
  if (open === "import") return <Import />;
  return null;
}

/** A sheet that takes the focus and gives it back. */
function Sheet({ title, children }: { title: string; children: ComponentChildren }) {
  const store = useStore();
  const sheet = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const before = document.activeElement;
    const dialog = sheet.current!;
    dialog.showModal();
    return () => {
      dialog.close();
      if (before instanceof HTMLElement) before.focus();
    };
  }, []);
  const close = (): void => {
    store.dialog.value = null;
  };
  return (
    <dialog
      ref={sheet}
      class="sheet"
      aria-label={title}
      onCancel={(event) => {
        event.preventDefault();
        close();
      }}
      onClick={(event) => event.target === sheet.current && close()}
    >
      <div class="sheet-content">
        <header>
          <h2>{title}</h2>
          <Action icon="close" name="Close" keys="Esc" act={close} />
        </header>
        {children}
      </div>
    </dialog>
  );
}

function Help() {
  const sections = ["Walk", "Show", "Subgraph", "Page"] as const;
  return (
    <Sheet title="Keyboard and pointer">
      <div class="keys">
        {sections.map((section) => (
          <section key={section}>
            <h3>{section}</h3>
            <dl>
              {KEYS.filter((action) => action.section === section).map((action) => (
                <div key={action.shown}>
                  <dt>
                    <kbd>{action.shown}</kbd>
                  </dt>
                  <dd>{action.text}</dd>
                </div>
              ))}
            </dl>
          </section>
        ))}
      </div>
      <p class="hint">
        Drag moves the graph, the wheel zooms. Click selects, Ctrl-click pins, Shift-click chooses, Shift-drag chooses
        all features in a rectangle; Shift holds what the pointer showed. In the subgraph, drag a box onto another to
        group them.
      </p>
    </Sheet>
  );
}

const ORDERS: Record<string, (a: GraphNode, b: GraphNode) => number> = {
  influence: (a, b) => b.influence - a.influence,
  position: (a, b) => a.position - b.position || a.layer - b.layer,
  layer: (a, b) => a.layer - b.layer || a.position - b.position,
};

/** All nodes as a table: what the canvas shows, for a screen reader or for whoever likes lists. */
function NodeList({ graph }: { graph: GraphController | null }) {
  const store = useStore();
  const [order, setOrder] = useState("influence");
  const model = store.model.value;
  if (!model) return null;
  const visible = model.visible(store.filter.value);
  const nodes = model.view.nodes.filter((_, i) => visible[i]).sort(ORDERS[order]);
  const choose = (node: GraphNode): void => {
    store.dialog.value = null;
    store.select(node.id);
    graph?.reveal(node.id);
  };
  return (
    <Sheet title={`${nodes.length} nodes`}>
      <label class="row">
        Sorted by
        <select value={order} onChange={(event) => setOrder(event.currentTarget.value)}>
          {Object.keys(ORDERS).map((name) => (
            <option key={name}>{name}</option>
          ))}
        </select>
      </label>
      <table class="nodes">
        <thead>
          <tr>
            <th>Node</th>
            <th>Token</th>
            <th class="number">Influence</th>
            <th class="number">Activation</th>
          </tr>
        </thead>
        <tbody>
          {nodes.slice(0, 500).map((node) => (
            <tr key={node.id}>
              <td>
                <button class="plain" onClick={() => choose(node)}>
                  <NodeName node={node} />
                </button>
              </td>
              <td>{model.view.tokens[node.position]}</td>
              <td class="number">{decimal(node.influence)}</td>
              <td class="number">{decimal(node.value)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {nodes.length > 500 && <p class="hint">The first 500; search finds the others.</p>}
    </Sheet>
  );
}

function Import() {
  const store = useStore();
  const [text, setText] = useState("");
  const send = async (): Promise<void> => {
    try {
      store.adopt(await store.source.importLink(store.graph.value!, text));
      store.dialog.value = null;
      store.say("Pins, groups and labels are imported");
    } catch (error) {
      store.report(error);
    }
  };
  return (
    <Sheet title="Import a link">
      <p class="hint">
        Paste the address of a Neuronpedia or circuit-tracer graph. Its pinned nodes, supernodes and labels come into
        this graph; nothing is fetched.
      </p>
      <textarea rows={5} aria-label="Link" value={text} onInput={(event) => setText(event.currentTarget.value)} />
      <div class="row end">
        <button class="primary" disabled={text.trim() === ""} onClick={() => void send()}>
          Import
        </button>
      </div>
    </Sheet>
  );
}
