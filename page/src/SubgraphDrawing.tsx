/** The drawing of the subgraph: boxes that can be dragged, and the sums of the edges between them. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { TargetedPointerEvent } from "preact";
import { BOX_HEIGHT, extent, placeBoxes, type PlacedBox } from "./subgraph_layout";
import { addToGroup, groupNodes, togglePin, type Box, type BoxEdge } from "./groups";
import { groupColour } from "./palette";
import { decimal, nodeName, percent } from "./model";
import { useStore } from "./context";
import { textOf } from "./graph_controller";
import type { Store } from "./store";

interface Props {
  boxes: Box[];
  edges: BoxEdge[];
  current: string | null;
  setCurrent: (id: string | null) => void;
}

interface Drag {
  id: string;
  dx: number;
  dy: number;
  moved: boolean;
}

const LEAST_SHARE = 0.005; // an edge of less is not drawn

export function SubgraphDrawing({ boxes, edges, current, setCurrent }: Props) {
  const store = useStore();
  const frame = useRef<HTMLDivElement>(null);
  const size = useSize(frame);
  const [drag, setDrag] = useState<Drag | null>(null);
  const [hovered, setHovered] = useState<string | null>(null);
  const { labels, layout } = store.document.value;
  const layers = store.model.value?.view.layers ?? 0;
  const placed = useMemo(
    () =>
      placeBoxes(boxes, layout, { ...size, layers }, (box) => Math.min(210, 22 + 6.9 * boxText(box, labels).length)),
    [boxes, layout, size, layers, labels],
  );
  const moving = placed.map((box) => (box.id === drag?.id ? { ...box, x: box.x + drag.dx, y: box.y + drag.dy } : box));
  const over = drag?.moved
    ? moving.find(
        (box) =>
          box.id !== drag.id &&
          covers(
            box,
            moving.find((m) => m.id === drag.id)!,
          ),
      )
    : undefined;
  const view = extent(placed, { ...size, layers });
  const focus = hovered ?? current;
  const start = (box: PlacedBox) => (event: TargetedPointerEvent<SVGGElement>) =>
    beginDrag(event, view.width / size.width, {
      move: (dx, dy) => setDrag({ id: box.id, dx, dy, moved: true }),
      end: (dx, dy, moved, additive) => {
        setDrag(null);
        if (!moved) press(store, box, additive, setCurrent);
        else drop(store, placed, box, dx, dy);
      },
    });
  return (
    <div class="subgraph-frame" ref={frame}>
      <svg
        class="subgraph-svg"
        viewBox={`${view.left} ${view.top} ${view.width} ${view.height}`}
        role="group"
        aria-label="Subgraph of pinned nodes"
        onClick={(event) => event.target === event.currentTarget && setCurrent(null)}
      >
        <Hulls boxes={moving} />
        {edges.map((edge) => (
          <EdgeLine key={`${edge.source}-${edge.target}`} edge={edge} boxes={moving} focus={focus} />
        ))}
        {moving.map((box) => (
          <BoxShape
            key={box.id}
            box={box}
            chosen={box.id === current || (!box.group?.collapsed && box.nodes[0]!.id === store.selected.value)}
            target={box === over}
            faded={focus !== null && !isNear(focus, box, moving, edges)}
            onPointerDown={start(box)}
            onHover={(on) => {
              setHovered(on ? box.id : null);
              store.hovered.value = on && box.nodes.length === 1 ? box.nodes[0]!.id : null;
            }}
            onKey={(key) => {
              if (key === "Enter" || key === " ") press(store, box, false, setCurrent);
              if (key === "Delete" || key === "Backspace")
                store.change((document) => box.nodes.forEach((node) => togglePin(document, node.id)));
            }}
          />
        ))}
      </svg>
    </div>
  );
}

function useSize(frame: { current: HTMLDivElement | null }): { width: number; height: number } {
  const [size, setSize] = useState({ width: 800, height: 260 });
  useEffect(() => {
    const element = frame.current!;
    const observer = new ResizeObserver(() => {
      if (element.clientWidth > 0) setSize({ width: element.clientWidth, height: Math.max(120, element.clientHeight) });
    });
    observer.observe(element);
    return () => observer.disconnect();
  }, [frame]);
  return size;
}

function boxText(box: Box, labels: Record<string, string>): string {
  if (box.group?.collapsed) return `${box.name} ×${box.nodes.length}`;
  return textOf(box.nodes[0]!, labels);
}

const covers = (box: PlacedBox, other: PlacedBox): boolean =>
  Math.abs(box.x - other.x) < (box.w + other.w) / 4 && Math.abs(box.y - other.y) < BOX_HEIGHT * 0.7;

function isNear(focus: string, box: PlacedBox, boxes: PlacedBox[], edges: BoxEdge[]): boolean {
  if (box.id === focus) return true;
  return edges.some(({ source, target, share }) => {
    const a = boxes[source];
    const b = boxes[target];
    return share >= LEAST_SHARE && ((a?.id === focus && b === box) || (b?.id === focus && a === box));
  });
}

interface DragHandlers {
  move: (dx: number, dy: number) => void;
  end: (dx: number, dy: number, moved: boolean, additive: boolean) => void;
}

function beginDrag(event: TargetedPointerEvent<SVGGElement>, scale: number, { move, end }: DragHandlers): void {
  const element = event.currentTarget;
  const { clientX, clientY, pointerId } = event;
  element.setPointerCapture(pointerId);
  let moved = false;
  const delta = (e: PointerEvent): [number, number] => [(e.clientX - clientX) * scale, (e.clientY - clientY) * scale];
  const onMove = (e: PointerEvent): void => {
    const [dx, dy] = delta(e);
    moved ||= Math.hypot(dx, dy) > 4;
    if (moved) move(dx, dy);
  };
  const onUp = (e: PointerEvent): void => {
    element.removeEventListener("pointermove", onMove);
    element.removeEventListener("pointerup", onUp);
    element.removeEventListener("pointercancel", onUp);
    end(...delta(e), moved, e.ctrlKey || e.metaKey);
  };
  element.addEventListener("pointermove", onMove);
  element.addEventListener("pointerup", onUp);
  element.addEventListener("pointercancel", onUp);
}

/** A press on a box: select its node, or show the tools of its group; with Ctrl, unpin it. */
function press(store: Store, box: Box, additive: boolean, setCurrent: (id: string | null) => void): void {
  if (additive) return store.change((document) => box.nodes.forEach((node) => togglePin(document, node.id)));
  setCurrent(box.group ? box.group.name : box.id);
  if (!box.group?.collapsed) {
    store.select(box.nodes[0]!.id);
    store.show(store.tab.value === "subgraph" ? "subgraph" : "node");
  }
}

/** The end of a drag: onto another box it groups the two, elsewhere it is the box's new place. */
function drop(store: Store, placed: PlacedBox[], box: PlacedBox, dx: number, dy: number): void {
  const moved = { ...box, x: box.x + dx, y: box.y + dy };
  const over = placed.find((other) => other.id !== box.id && covers(other, moved));
  store.change((document) => {
    if (!over) document.layout[box.id] = [Math.round(moved.x), Math.round(moved.y)];
    else if (over.group)
      addToGroup(
        document,
        over.group.name,
        box.nodes.map((node) => node.id),
      );
    else if (box.group?.collapsed)
      addToGroup(
        document,
        box.group.name,
        over.nodes.map((node) => node.id),
      );
    else
      groupNodes(
        document,
        [...over.nodes, ...box.nodes].map((node) => node.id),
        nodeName(over.nodes[0]!, document.labels),
      );
  });
}

/** Frames around the nodes of expanded groups. */
function Hulls({ boxes }: { boxes: PlacedBox[] }) {
  const store = useStore();
  return (
    <>
      {store.document.value.groups.map((group, index) => {
        const inside = boxes.filter((box) => box.group?.name === group.name && !group.collapsed);
        if (inside.length === 0) return null;
        const left = Math.min(...inside.map((box) => box.x - box.w / 2)) - 8;
        const right = Math.max(...inside.map((box) => box.x + box.w / 2)) + 8;
        const top = Math.min(...inside.map((box) => box.y)) - BOX_HEIGHT / 2 - 18;
        const bottom = Math.max(...inside.map((box) => box.y)) + BOX_HEIGHT / 2 + 8;
        return (
          <g key={group.name} class="hull">
            <rect x={left} y={top} width={right - left} height={bottom - top} rx={8} stroke={groupColour(index)} />
            <text x={left + 8} y={top + 12}>
              {group.name}
            </text>
          </g>
        );
      })}
    </>
  );
}

/** Pixels by which an edge bends aside, so that it does not run behind a box between its ends. */
function sideways(source: PlacedBox, target: PlacedBox, boxes: PlacedBox[]): number {
  const [low, high] = [Math.min(source.y, target.y), Math.max(source.y, target.y)];
  const between = boxes.filter((box) => {
    if (box === source || box === target || box.y < low + BOX_HEIGHT || box.y > high - BOX_HEIGHT) return false;
    const x = source.x + ((target.x - source.x) * (box.y - source.y)) / (target.y - source.y);
    return Math.abs(box.x - x) < box.w / 2 + 4;
  });
  if (between.length === 0) return 0;
  const widest = Math.max(...between.map((box) => box.w));
  return (target.x >= source.x ? 1 : -1) * (widest * 0.75 + 30);
}

function EdgeLine({ edge, boxes, focus }: { edge: BoxEdge; boxes: PlacedBox[]; focus: string | null }) {
  const source = boxes[edge.source];
  const target = boxes[edge.target];
  if (!source || !target || edge.share < LEAST_SHARE) return null;
  const rises = source.y > target.y;
  const y1 = source.y + (rises ? -1 : 1) * (BOX_HEIGHT / 2);
  const y2 = target.y + (rises ? 1 : -1) * (BOX_HEIGHT / 2 + 2);
  const bend = Math.max(16, Math.abs(y1 - y2) * 0.45) * (rises ? 1 : -1);
  const near = focus === source.id || focus === target.id;
  const kind = edge.weight < 0 ? "negative" : "positive";
  const bow = sideways(source, target, boxes);
  const path = `M${source.x},${y1} C${source.x + bow},${y1 - bend} ${target.x + bow},${y2 + bend} ${target.x},${y2}`;
  return (
    <g class={`edge ${kind}${focus !== null && !near ? " faded" : ""}`}>
      <path
        d={path}
        stroke-width={1 + 7 * Math.sqrt(Math.min(1, edge.share))}
        opacity={Math.min(0.9, 0.25 + 1.2 * Math.sqrt(edge.share))}
      >
        <title>{`${decimal(edge.weight)}, ${percent(edge.share)} of the input`}</title>
      </path>
      {near && (
        <text x={(source.x + target.x) / 2 + 0.75 * bow} y={(y1 + y2) / 2} class="edge-share">
          {`${edge.weight < 0 ? "−" : ""}${percent(edge.share)}`}
        </text>
      )}
    </g>
  );
}

interface BoxProps {
  box: PlacedBox;
  chosen: boolean;
  target: boolean;
  faded: boolean;
  onPointerDown: (event: TargetedPointerEvent<SVGGElement>) => void;
  onHover: (on: boolean) => void;
  onKey: (key: string) => void;
}

function BoxShape({ box, chosen, target, faded, onPointerDown, onHover, onKey }: BoxProps) {
  const store = useStore();
  const { labels, groups } = store.document.value;
  const collapsed = box.group?.collapsed === true;
  const colour = box.group ? groupColour(groups.findIndex((group) => group.name === box.group!.name)) : null;
  const kind = collapsed ? "group" : box.nodes[0]!.kind;
  const text = boxText(box, labels);
  const letters = Math.floor((box.w - 16) / 6.6);
  const [left, top] = [-box.w / 2, -BOX_HEIGHT / 2];
  return (
    <g
      class={`box ${kind}${chosen ? " chosen" : ""}${target ? " target-of-drop" : ""}${faded ? " faded" : ""}`}
      transform={`translate(${box.x},${box.y})`}
      tabIndex={0}
      role="button"
      aria-label={collapsed ? `Group ${text}` : `${text}, ${box.nodes[0]!.id}`}
      data-box={box.id}
      onPointerDown={onPointerDown}
      onPointerEnter={() => onHover(true)}
      onPointerLeave={() => onHover(false)}
      onKeyDown={(event) => {
        if (!["Enter", " ", "Delete", "Backspace"].includes(event.key)) return;
        event.preventDefault();
        onKey(event.key);
      }}
    >
      {collapsed && <rect class="behind" x={left + 3} y={top - 3} width={box.w} height={BOX_HEIGHT} rx={8} />}
      <rect
        x={left}
        y={top}
        width={box.w}
        height={BOX_HEIGHT}
        rx={kind === "token" ? 4 : 8}
        style={colour ? { stroke: colour } : undefined}
      />
      {colour && (
        <rect
          class="stripe"
          x={left + 5}
          y={top + 7}
          width={4}
          height={BOX_HEIGHT - 14}
          rx={2}
          style={{ fill: colour }}
        />
      )}
      <text y={1}>{text.length > letters ? `${text.slice(0, letters - 1)}…` : text}</text>
      <title>{box.nodes.map((node) => `${nodeName(node, labels)}  ${node.id}`).join("\n")}</title>
    </g>
  );
}
