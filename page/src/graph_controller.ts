/** The graph on its two canvases: builds the scene from the store, moves the camera, and answers the pointer. */

import { effect } from "@preact/signals";
import { BaseLayer } from "./base_layer";
import { clamped, fit, panned, revealing, zoomed, type Camera, type Size } from "./camera";
import { HitGrid } from "./hit";
import { layOut } from "./layout";
import { featureKey, nodeName, percent, shortLabel } from "./model";
import { paintOverlay } from "./overlay";
import { groupColour, readPalette } from "./palette";
import { highestInfluence, type Scene } from "./paint";
import { isPinned, togglePin } from "./groups";
import type { Store } from "./store";
import type { GraphNode } from "./types";

export class GraphController {
  scene: Scene | null = null;
  camera: Camera = { k: 1, dx: 0, dy: 0 };
  size: Size = { width: 1, height: 1 };
  lasso: [number, number, number, number] | null = null;
  private readonly base: BaseLayer;
  private hits: HitGrid | null = null;
  private overlayFrame = 0;
  private cameraTimer = 0;
  private readonly stops: (() => void)[] = [];

  constructor(
    private readonly store: Store,
    private readonly frame: HTMLElement,
    baseCanvas: HTMLCanvasElement,
    private readonly overlay: HTMLCanvasElement,
  ) {
    this.base = new BaseLayer(baseCanvas);
    this.base.onComplete = () => performance.mark("pycircuit-complete");
    const resize = new ResizeObserver(() => this.onResize());
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const onDark = (): void => void requestAnimationFrame(() => this.build()); // once the page has its colours
    dark.addEventListener("change", onDark);
    resize.observe(frame);
    this.onResize();
    this.stops.push(
      () => resize.disconnect(),
      () => dark.removeEventListener("change", onDark),
      () => this.base.stop(),
      effect(() => this.build()),
      effect(() => this.onCameraSignal()),
      store.theme.subscribe(() => void requestAnimationFrame(() => this.build())), // once the page has its colours
      ...[store.hovered, store.selected, store.chosen, store.paths].map((cause) =>
        cause.subscribe(() => this.refresh()),
      ),
    );
  }

  dispose(): void {
    this.stops.forEach((stop) => stop());
    cancelAnimationFrame(this.overlayFrame);
  }

  private onResize(): void {
    const { clientWidth: width, clientHeight: height } = this.frame;
    if (width < 10 || height < 10 || (width === this.size.width && height === this.size.height)) return;
    this.size = { width, height };
    if (this.scene) this.build();
  }

  /** Lay the graph out and draw it. */
  private build(): void {
    const model = this.store.model.value;
    const filter = this.store.filter.value;
    const document = this.store.document.value;
    if (!model) return;
    const text = (node: GraphNode, short: boolean): string => textOf(node, document.labels, short);
    const visible = model.visible(filter);
    const layout = layOut(model.view, {
      visible,
      text,
      measure: measureText(this.overlay, getComputedStyle(this.frame).fontFamily),
      available: { width: this.size.width - 70, height: this.size.height - 22 },
    });
    const groupColours = new Map<string, string>();
    document.groups.forEach((group, i) => group.nodes.forEach((id) => groupColours.set(id, groupColour(i))));
    const same = this.scene?.model === model;
    this.scene = {
      model,
      layout,
      palette: readPalette(this.frame),
      highest: highestInfluence(model),
      edges: model.visibleEdges(filter, visible),
      visible,
      text: (node) => text(node, layout.short),
      pinned: new Set([...document.pins, ...document.groups.flatMap((group) => group.nodes)]),
      groupColours,
      own: this.store.own.value,
    };
    this.hits = new HitGrid(layout);
    const wanted = this.store.camera.peek();
    this.camera = wanted ?? this.fitted();
    this.base.setScene(this.scene, this.camera, this.size);
    if (!same) performance.mark("pycircuit-first-view");
    this.refresh();
  }

  private onCameraSignal(): void {
    const wanted = this.store.camera.value;
    if (!this.scene) return;
    const next = wanted ?? this.fitted();
    if (next.k === this.camera.k && next.dx === this.camera.dx && next.dy === this.camera.dy) return;
    this.camera = next;
    this.base.move(next);
    this.refresh();
  }

  /** The camera that shows the whole graph, but for one of dots that would be too small to see: then the end of it. */
  private fitted(): Camera {
    const { layout } = this.scene!;
    return fit(layout, this.size, 1.2, layout.chips ? 0.7 : 0.2);
  }

  private moveTo(camera: Camera): void {
    if (!this.scene) return;
    this.camera = clamped(camera, this.scene.layout, this.size);
    this.base.move(this.camera);
    this.refresh();
    window.clearTimeout(this.cameraTimer);
    this.cameraTimer = window.setTimeout(() => (this.store.camera.value = this.camera), 250);
  }

  pan(dx: number, dy: number): void {
    this.moveTo(panned(this.camera, dx, dy));
  }

  zoom(factor: number, x = this.size.width / 2, y = this.size.height / 2): void {
    this.moveTo(zoomed(this.camera, factor, x, y));
  }

  fit(): void {
    window.clearTimeout(this.cameraTimer);
    this.store.camera.value = null;
    this.onCameraSignal();
  }

  /** Move a node into sight. */
  reveal(id: string): void {
    const i = this.scene?.model.byId.get(id);
    if (this.scene === null || i === undefined || this.scene.layout.w[i] === 0) return;
    const next = revealing(this.camera, this.scene.layout.x[i]!, this.scene.layout.y[i]!, this.size);
    if (next.dx !== this.camera.dx || next.dy !== this.camera.dy) this.moveTo(next);
  }

  /** A point of the frame in graph coordinates. */
  world(px: number, py: number): [number, number] {
    return [(px - this.camera.dx) / this.camera.k, (py - this.camera.dy) / this.camera.k];
  }

  nodeAt(px: number, py: number): GraphNode | null {
    if (!this.hits || !this.scene) return null;
    const [x, y] = this.world(px, py);
    const i = this.hits.nodeAt(x, y, 9 / this.camera.k);
    return i < 0 ? null : this.scene.model.view.nodes[i]!;
  }

  /** Boxes of all nodes that are drawn, in pixels of the frame, those that are ringed, and the scale of the drawing. */
  places(): { scale: number; boxes: Record<string, [number, number, number, number]>; own: string[] } {
    const boxes: Record<string, [number, number, number, number]> = {};
    const { k, dx, dy } = this.camera;
    if (this.scene) {
      const { layout, model } = this.scene;
      model.view.nodes.forEach((node, i) => {
        const [x, y, w, h] = [layout.x[i]!, layout.y[i]!, layout.w[i]! / 2, layout.h[i]! / 2];
        if (w > 0) boxes[node.id] = [k * (x - w) + dx, k * (y - h) + dy, k * (x + w) + dx, k * (y + h) + dy];
      });
    }
    return { scale: k, boxes, own: [...(this.scene?.own ?? [])].filter((id) => id in boxes) };
  }

  /** Where a node is in the frame. */
  place(id: string): [number, number] | null {
    const i = this.scene?.model.byId.get(id);
    if (this.scene === null || i === undefined || this.scene.layout.w[i] === 0) return null;
    const { x, y } = this.scene.layout;
    return [x[i]! * this.camera.k + this.camera.dx, y[i]! * this.camera.k + this.camera.dy];
  }

  /** Choose the features and errors in the rectangle. */
  endLasso(): void {
    const rectangle = this.lasso;
    this.lasso = null;
    if (!rectangle || !this.hits || !this.scene) return this.refresh();
    const nodes = this.hits.nodesIn(...rectangle).map((i) => this.scene!.model.view.nodes[i]!);
    this.store.chosen.value = nodes.filter((node) => node.kind === "feature").map((node) => node.id);
    this.refresh();
  }

  pin(id: string): void {
    this.store.change((document) => togglePin(document, id));
    this.store.say(isPinned(this.store.document.value, id) ? "Pinned" : "Unpinned");
  }

  /** Draw the overlay in the next frame. */
  refresh(): void {
    cancelAnimationFrame(this.overlayFrame);
    this.overlayFrame = requestAnimationFrame(() => this.drawOverlay());
  }

  private drawOverlay(): void {
    if (!this.scene) return;
    const { model } = this.scene;
    const index = (id: string | null): number => (id === null ? -1 : (model.byId.get(id) ?? -1));
    const selected = index(this.store.selected.value);
    const hovered = index(this.store.hovered.value);
    const path = this.pathOf();
    const focus = {
      node: hovered >= 0 ? hovered : selected,
      selected,
      chosen: this.store.chosen.value.map(index),
      ...path,
      pathEdges: hovered >= 0 ? new Uint32Array() : path.pathEdges,
      lasso: this.lasso,
    };
    this.frame.classList.toggle("dimmed", focus.node >= 0 || focus.pathEdges.length > 0);
    paintOverlay(this.overlay, this.scene, this.camera, this.size, focus);
  }

  private pathOf(): { pathNodes: number[]; pathEdges: Uint32Array } {
    const nodes = new Set<number>();
    const edges = new Set<number>();
    const { model } = this.scene!;
    for (const path of this.store.paths.value ?? []) {
      const indices = path.nodes.map((node) => model.byId.get(node.id) ?? -1);
      indices.forEach((node) => node >= 0 && nodes.add(node));
      indices.slice(1).forEach((target, step) => {
        const source = indices[step]!;
        if (source < 0 || target < 0) return;
        const edge = model.edgesInto(target).find((candidate) => model.view.edges.source[candidate] === source);
        if (edge !== undefined) edges.add(edge);
      });
    }
    return { pathNodes: [...nodes], pathEdges: Uint32Array.from(edges) };
  }
}

export function textOf(node: GraphNode, labels: Record<string, string>, short = false): string {
  const name = short && node.automatic && !labels[featureKey(node)] ? shortLabel(node.label) : nodeName(node, labels);
  return node.kind === "target" && node.weight !== null ? `${name} ${percent(node.weight)}` : name;
}

const WIDTHS = new Map<string, number>();

function measureText(canvas: HTMLCanvasElement, family: string): (text: string) => number {
  const context = canvas.getContext("2d")!;
  return (text) => {
    const known = WIDTHS.get(text);
    if (known !== undefined) return known;
    context.font = `12px ${family}`;
    const width = context.measureText(text).width + 2;
    WIDTHS.set(text, width);
    return width;
  };
}
