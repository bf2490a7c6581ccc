/** Export of pictures and files, and import of a link. */

import { useEffect, useRef, useState } from "preact/hooks";
import { Action } from "./Header";
import { layOut } from "./layout";
import { readPalette } from "./palette";
import { download, graphSvg, pngOf, standaloneSvg } from "./svg";
import { textOf } from "./graph_controller";
import { useStore } from "./context";
import { highestInfluence, type Scene } from "./paint";
import type { Store } from "./store";
import type { GraphNode } from "./types";

export function ExportMenu() {
  const store = useStore();
  const [open, setOpen] = useState(false);
  const menu = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (!open) return undefined;
    menu.current?.querySelector("button")?.focus();
    const close = (event: Event): void => {
      if (
        event instanceof KeyboardEvent
          ? event.key === "Escape"
          : !menu.current?.parentElement?.contains(event.target as Node)
      )
        setOpen(false);
    };
    window.addEventListener("pointerdown", close);
    window.addEventListener("keydown", close);
    return () => {
      window.removeEventListener("pointerdown", close);
      window.removeEventListener("keydown", close);
    };
  }, [open]);
  const item = (text: string, act: () => Promise<void> | void) => (
    <button
      role="menuitem"
      onClick={() => {
        setOpen(false);
        void Promise.resolve(act()).catch((error: unknown) => store.report(error));
      }}
    >
      {text}
    </button>
  );
  return (
    <div class="menu-holder">
      <Action icon="download" name="Export" keys="S" press="s" act={() => setOpen(!open)} />
      {open && (
        <div class="menu" role="menu" aria-label="Export" ref={menu} onKeyDown={moveInMenu}>
          {item("Graph as SVG", () => download(graphPicture(store), `${fileName(store)}.svg`, "image/svg+xml"))}
          {item("Graph as PNG", async () =>
            download(await pngOf(graphPicture(store)), `${fileName(store)}.png`, "image/png"),
          )}
          {store.root.querySelector(".subgraph-svg") && (
            <>
              {item("Subgraph as SVG", () =>
                download(subgraphPicture(store), `${fileName(store)}-subgraph.svg`, "image/svg+xml"),
              )}
              {item("Subgraph as PNG", async () =>
                download(await pngOf(subgraphPicture(store)), `${fileName(store)}-subgraph.png`, "image/png"),
              )}
            </>
          )}
          <hr />
          {store.source.live ? (
            <>
              {item("JSON for circuit-tracer", () => json(store, "circuit-tracer"))}
              {item("JSON for Neuronpedia", () => json(store, "neuronpedia"))}
              <hr />
              {item("Import a link…", () => void (store.dialog.value = "import"))}
            </>
          ) : (
            item("JSON", () => json(store, "embedded"))
          )}
        </div>
      )}
    </div>
  );
}

function moveInMenu(event: KeyboardEvent): void {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  event.preventDefault();
  const menu = event.currentTarget as HTMLElement;
  const items = [...menu.querySelectorAll("button")];
  const now = items.indexOf(document.activeElement as HTMLButtonElement);
  items[(now + (event.key === "ArrowDown" ? 1 : items.length - 1)) % items.length]?.focus();
}

const fileName = (store: Store): string => (store.graph.value ?? "graph").replace(/\.[a-z]+$/, "");

async function json(store: Store, flavour: string): Promise<void> {
  download(await store.source.exported(store.graph.value!, flavour), `${fileName(store)}.json`, "application/json");
}

/** The graph as SVG, in the light colours of paper. */
function graphPicture(store: Store): string {
  const model = store.model.value!;
  const { labels, pins, groups } = store.document.value;
  return onPaper(store, (element) => {
    const text = (node: GraphNode, short: boolean): string => textOf(node, labels, short);
    const visible = model.visible(store.filter.value);
    const layout = layOut(model.view, {
      visible,
      text,
      measure: (words) => words.length * 6.4 + 4,
      available: { width: 900, height: 560 },
    });
    const scene: Scene = {
      model,
      layout,
      palette: readPalette(element),
      highest: highestInfluence(model),
      edges: model.visibleEdges(store.filter.value, visible),
      visible,
      text: (node) => text(node, layout.short),
      pinned: new Set([...pins, ...groups.flatMap((group) => group.nodes)]),
      groupColours: new Map(),
      own: store.own.value,
    };
    return graphSvg(scene, model.view.prompt, labels);
  });
}

function subgraphPicture(store: Store): string {
  const svg = store.root.querySelector<SVGSVGElement>(".subgraph-svg")!;
  return onPaper(store, (element) => standaloneSvg(svg, readPalette(element).panel));
}

/** Run with the light theme, as on paper, whatever the page shows. */
function onPaper(store: Store, run: (element: Element) => string): string {
  const page = store.root.querySelector<HTMLElement>(".page")!;
  const theme = page.dataset["theme"];
  page.dataset["theme"] = "light";
  try {
    return run(page);
  } finally {
    page.dataset["theme"] = theme;
  }
}
