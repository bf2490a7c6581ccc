/** The graph, with its pointer and touch. */

import { useEffect, useRef, useState } from "preact/hooks";
import { GraphController } from "./graph_controller";
import { featureKey, nodeName, percent, decimal } from "./model";
import { useStore } from "./context";
import type { Store } from "./store";
import type { GraphNode } from "./types";

interface Tip {
  node: GraphNode;
  x: number;
  y: number;
}

const DRAG_FROM = 4; // pixels that make a press a drag

export function GraphView({ onReady }: { onReady: (controller: GraphController) => void }) {
  const store = useStore();
  const frame = useRef<HTMLDivElement>(null);
  const base = useRef<HTMLCanvasElement>(null);
  const overlay = useRef<HTMLCanvasElement>(null);
  const [tip, setTip] = useState<Tip | null>(null);
  useEffect(() => {
    const controller = new GraphController(store, frame.current!, base.current!, overlay.current!);
    onReady(controller);
    const stop = listen(store, controller, frame.current!, setTip);
    return () => {
      stop();
      controller.dispose();
    };
  }, [store, onReady]);
  const model = store.model.value;
  const label = model
    ? `Attribution graph of “${model.view.prompt}”: ${model.view.nodes.length} nodes. Arrow keys walk along edges; L opens a list.`
    : "No graph is open";
  return (
    <div class="graph-frame" ref={frame} tabIndex={0} role="application" aria-label={label} data-testid="graph">
      <canvas class="graph-base" ref={base} aria-hidden="true" />
      <canvas class="graph-overlay" ref={overlay} aria-hidden="true" />
      {store.loading.value && <div class="busy-line" role="progressbar" aria-label="Pruning the graph" />}
      {tip && <Tooltip tip={tip} store={store} width={frame.current?.clientWidth ?? 600} />}
    </div>
  );
}

function Tooltip({ tip, store, width }: { tip: Tip; store: Store; width: number }) {
  const { node } = tip;
  const model = store.model.value;
  const index = model?.byId.get(node.id);
  const right = tip.x > width - 260;
  const style = {
    left: right ? "auto" : `${tip.x + 14}px`,
    right: right ? `${width - tip.x + 14}px` : "auto",
    top: `${tip.y + 12}px`,
  };
  return (
    <div class="tooltip" role="tooltip" style={style}>
      <b>{nodeName(node, store.document.value.labels)}</b>
      <span class="mono">{node.id}</span>
      <dl>
        {node.kind === "target" && <Fact name="probability" value={percent(node.weight, 1)} />}
        {node.value !== null && <Fact name="activation" value={decimal(node.value)} />}
        <Fact name="influence" value={decimal(node.influence)} />
        {model && index !== undefined && (
          <Fact name="edges" value={`${model.edgesInto(index).length} in, ${model.edgesOutOf(index).length} out`} />
        )}
      </dl>
      {node.kind === "feature" && node.automatic && !store.document.value.labels[featureKey(node)] && (
        <em>automatic label</em>
      )}
    </div>
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

/** Attach the pointer: hover, click, drag, lasso, pinch and wheel. Returns what detaches it. */
function listen(
  store: Store,
  graph: GraphController,
  frame: HTMLElement,
  setTip: (tip: Tip | null) => void,
): () => void {
  const pointers = new Map<number, [number, number]>();
  let pressed: { x: number; y: number; moved: boolean; lasso: boolean } | null = null;
  const local = (event: PointerEvent | WheelEvent): [number, number] => {
    const box = frame.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const hover = (x: number, y: number, frozen: boolean): void => {
    if (frozen && store.hovered.value !== null) return;
    const node = graph.nodeAt(x, y);
    if (store.hovered.value !== (node?.id ?? null)) store.hovered.value = node?.id ?? null;
    setTip(node ? { node, x, y } : null);
    frame.style.cursor = node ? "pointer" : "";
  };
  const down = (event: PointerEvent): void => {
    const [x, y] = local(event);
    pointers.set(event.pointerId, [x, y]);
    pressed = { x, y, moved: pointers.size > 1, lasso: event.shiftKey };
    frame.setPointerCapture(event.pointerId);
  };
  const move = (event: PointerEvent): void => {
    const [x, y] = local(event);
    const before = pointers.get(event.pointerId);
    if (!before || !pressed) return hover(x, y, event.shiftKey);
    if (pointers.size === 2) pinch(graph, pointers, event.pointerId, x, y);
    else if (!pressed.moved && Math.hypot(x - pressed.x, y - pressed.y) < DRAG_FROM) return;
    else if (pressed.lasso) drawLasso(graph, pressed, x, y);
    else graph.pan(x - before[0], y - before[1]);
    pressed.moved = true;
    pointers.set(event.pointerId, [x, y]);
    setTip(null);
  };
  const up = (event: PointerEvent): void => {
    pointers.delete(event.pointerId);
    const press = pressed;
    if (pointers.size === 0) pressed = null;
    if (!press) return;
    if (press.lasso && press.moved) graph.endLasso();
    else if (!press.moved && event.type === "pointerup") click(store, graph, event, ...local(event));
  };
  const leave = (): void => {
    store.hovered.value = null;
    setTip(null);
  };
  const wheel = (event: WheelEvent): void => {
    event.preventDefault();
    const [x, y] = local(event);
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (sideways || event.shiftKey) graph.pan(-(event.deltaX || event.deltaY), 0);
    else graph.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), x, y);
  };
  // For tests and scripts, which cannot see what a canvas shows: they dispatch it and read its detail.
  const tell = (event: Event): void => void Object.assign((event as CustomEvent<object>).detail, graph.places());
  const double = (event: MouseEvent): void => {
    const box = frame.getBoundingClientRect();
    if (!graph.nodeAt(event.clientX - box.left, event.clientY - box.top)) graph.fit();
  };
  frame.addEventListener("pointerdown", down);
  frame.addEventListener("pointermove", move);
  frame.addEventListener("pointerup", up);
  frame.addEventListener("pointercancel", up);
  frame.addEventListener("pointerleave", leave);
  frame.addEventListener("dblclick", double);
  frame.addEventListener("pycircuit-places", tell);
  frame.addEventListener("wheel", wheel, { passive: false });
  return () => {
    frame.removeEventListener("pointerdown", down);
    frame.removeEventListener("pointermove", move);
    frame.removeEventListener("pointerup", up);
    frame.removeEventListener("pointercancel", up);
    frame.removeEventListener("pointerleave", leave);
    frame.removeEventListener("dblclick", double);
    frame.removeEventListener("pycircuit-places", tell);
    frame.removeEventListener("wheel", wheel);
  };
}

function click(store: Store, graph: GraphController, event: PointerEvent, x: number, y: number): void {
  const node = graph.nodeAt(x, y);
  if (!node) {
    store.select(null);
    store.chosen.value = [];
    store.pathEnds.value = { from: null, to: null };
  } else if (event.ctrlKey || event.metaKey) graph.pin(node.id);
  else if (event.shiftKey) {
    const chosen = store.chosen.value;
    store.chosen.value = chosen.includes(node.id) ? chosen.filter((id) => id !== node.id) : [...chosen, node.id];
  } else store.select(node.id);
}

function drawLasso(graph: GraphController, press: { x: number; y: number }, x: number, y: number): void {
  const [x1, y1] = graph.world(press.x, press.y);
  const [x2, y2] = graph.world(x, y);
  graph.lasso = [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
  graph.refresh();
}

function pinch(
  graph: GraphController,
  pointers: Map<number, [number, number]>,
  moving: number,
  x: number,
  y: number,
): void {
  const still = [...pointers].find(([id]) => id !== moving)?.[1];
  const before = pointers.get(moving);
  if (!still || !before) return;
  const spread = (px: number, py: number): number => Math.max(1, Math.hypot(px - still[0], py - still[1]));
  graph.zoom(spread(x, y) / spread(...before), (x + still[0]) / 2, (y + still[1]) / 2);
}
