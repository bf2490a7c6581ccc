/** Pictures for papers: the graph and the subgraph as SVG with text as text, and either as PNG. */

import { ends, coloursOf, level, rowName, type Scene } from "./paint";
import { textOf } from "./graph_controller";
import type { GraphNode } from "./types";

const MOST_EDGES = 4000;
const WIDTHS = [0.4, 0.6, 1, 1.8, 3, 4.6];
const OPACITIES = [0.15, 0.22, 0.34, 0.5, 0.66, 0.8];
const MARGIN = { left: 56, top: 14, bottom: 40 };

const escaped = (text: string): string =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

/** The graph as SVG. title: the prompt. */
export function graphSvg(scene: Scene, title: string, labels: Record<string, string>): string {
  const { layout, palette, model } = scene;
  const width = layout.width + MARGIN.left + 12;
  const height = layout.height + MARGIN.top + MARGIN.bottom;
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width.toFixed(0)}" height="${height.toFixed(0)}" viewBox="0 0 ${width.toFixed(0)} ${height.toFixed(0)}" font-family="Helvetica, Arial, sans-serif" font-size="12">`,
    `<title>${escaped(title)}</title>`,
    `<rect width="100%" height="100%" fill="${palette.panel}"/>`,
    `<g transform="translate(${MARGIN.left} ${MARGIN.top})">`,
    ...layout.columns.flatMap((column, i) =>
      i % 2 === 0
        ? [rect(column.left - 4, 0, column.right - column.left + 8, layout.height, 5, palette.band, "none")]
        : [],
    ),
    '<g fill="none">',
    ...edgeParts(scene),
    "</g>",
    ...model.view.nodes.flatMap((node, i) => nodeParts(scene, node, i, labels)),
    ...layout.rows.map(
      (row) =>
        `<text x="-14" y="${(row.y + 4).toFixed(1)}" text-anchor="end" font-size="11" fill="${palette.muted}">${rowName(row.layer, model.view.layers)}</text>`,
    ),
    "</g>",
    legend(scene, height - 14),
    "</svg>",
  ];
  return parts.join("\n");
}

function rect(x: number, y: number, w: number, h: number, r: number, fill: string, stroke: string): string {
  const number = (value: number): string => value.toFixed(1);
  return `<rect x="${number(x)}" y="${number(y)}" width="${number(w)}" height="${number(h)}" rx="${r}" fill="${fill}" stroke="${stroke}"/>`;
}

function edgeParts(scene: Scene): string[] {
  const { weight, share } = scene.model.view.edges;
  const strongest = [...scene.edges.slice(0, MOST_EDGES)].reverse();
  return strongest.map((edge) => {
    const [x1, y1, x2, y2] = ends(scene, edge).map((value) => Number(value.toFixed(1))) as [
      number,
      number,
      number,
      number,
    ];
    const bend = Math.max(12, Math.abs(y1 - y2) * 0.45);
    const size = level(share[edge]!);
    const negative = weight[edge]! < 0;
    const colour = negative ? scene.palette.negative : scene.palette.positive;
    const dash = negative ? ' stroke-dasharray="6 4"' : "";
    return `<path d="M${x1} ${y1}C${x1} ${(y1 - bend).toFixed(1)} ${x2} ${(y2 + bend).toFixed(1)} ${x2} ${y2}" stroke="${colour}" stroke-width="${WIDTHS[size]!}" opacity="${OPACITIES[size]!}"${dash}/>`;
  });
}

function nodeParts(scene: Scene, node: GraphNode, i: number, labels: Record<string, string>): string[] {
  const { layout, palette } = scene;
  const [x, y, w, h] = [layout.x[i]!, layout.y[i]!, layout.w[i]!, layout.h[i]!];
  if (w === 0) return [];
  const colours = coloursOf(node, palette, Math.sqrt(Math.max(0, node.influence) / scene.highest));
  const line = scene.pinned.has(node.id) ? (scene.groupColours.get(node.id) ?? palette.pin) : colours.line;
  const title = `<title>${escaped(`${textOf(node, labels)} ${node.id}`)}</title>`;
  if (node.kind === "error")
    return [
      `<path d="M${x} ${y - h / 2}L${x + w / 2} ${y}L${x} ${y + h / 2}L${x - w / 2} ${y}Z" fill="${colours.fill}" stroke="${line}">${title}</path>`,
    ];
  if (w <= h)
    return [`<circle cx="${x}" cy="${y}" r="${w / 2}" fill="${colours.fill}" stroke="${line}">${title}</circle>`];
  const radius = node.kind === "token" ? 3 : node.kind === "target" ? 7 : h / 2;
  const letters = Math.max(2, Math.floor((w - 10) / 5.8));
  const text = scene.text(node);
  const shown = text.length > letters ? `${text.slice(0, letters - 1)}…` : text;
  const style = node.kind === "target" ? ' font-weight="600"' : node.automatic ? ' font-style="italic"' : "";
  return [
    `<g>${title}${rect(x - w / 2, y - h / 2, w, h, radius, colours.fill, line)}<text x="${x.toFixed(1)}" y="${(y + 4).toFixed(1)}" text-anchor="middle" fill="${palette.ink}"${style}>${escaped(shown)}</text></g>`,
  ];
}

function legend(scene: Scene, y: number): string {
  const { palette } = scene;
  const x = MARGIN.left;
  return (
    `<g font-size="11" fill="${palette.muted}"><path d="M${x} ${y - 4}h22" stroke="${palette.positive}" stroke-width="2.4"/>` +
    `<text x="${x + 28}" y="${y}">raises</text><path d="M${x + 76} ${y - 4}h22" stroke="${palette.negative}" stroke-width="2.4" stroke-dasharray="6 4"/>` +
    `<text x="${x + 104}" y="${y}">lowers</text><text x="${x + 158}" y="${y}">width: share of the target’s input</text></g>`
  );
}

const STYLES = [
  "fill",
  "stroke",
  "stroke-width",
  "stroke-dasharray",
  "opacity",
  "font-size",
  "font-style",
  "font-weight",
  "text-anchor",
  "dominant-baseline",
];

/** A drawing of the page as a document of its own: the styles that the page gives it become its own. */
export function standaloneSvg(svg: SVGSVGElement, ground: string): string {
  const copy = svg.cloneNode(true) as SVGSVGElement;
  const originals = [...svg.querySelectorAll("*")];
  [...copy.querySelectorAll("*")].forEach((element, i) => {
    const style = getComputedStyle(originals[i]!);
    for (const name of STYLES) element.setAttribute(name, style.getPropertyValue(name));
    for (const name of ["class", "tabindex", "role", "aria-label", "data-box"]) element.removeAttribute(name);
  });
  const { width, height, x, y } = svg.viewBox.baseVal;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", String(Math.round(width)));
  copy.setAttribute("height", String(Math.round(height)));
  copy.setAttribute("font-family", "Helvetica, Arial, sans-serif");
  const back = `<rect x="${x}" y="${y}" width="${width}" height="${height}" fill="${ground}"/>`;
  copy.innerHTML = back + copy.innerHTML;
  return new XMLSerializer().serializeToString(copy);
}

/** Draw an SVG at three times its size and return it as PNG. */
export async function pngOf(svg: string): Promise<Blob> {
  const address = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  try {
    const image = new Image();
    image.src = address;
    await image.decode();
    const scale = Math.min(3, 12000 / Math.max(image.width, image.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.round(image.width * scale);
    canvas.height = Math.round(image.height * scale);
    canvas.getContext("2d")!.drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve, reject) =>
      canvas.toBlob(
        (blob) => (blob ? resolve(blob) : reject(new Error("The picture is too large for PNG"))),
        "image/png",
      ),
    );
  } finally {
    URL.revokeObjectURL(address);
  }
}

export function download(content: Blob | string, name: string, type: string): void {
  const blob = typeof content === "string" ? new Blob([content], { type }) : content;
  const address = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  window.setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
