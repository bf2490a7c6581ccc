/**
 * Widths of columns and lines of rows with which a drawing fills its frame at the largest scale.
 *
 * Every row begins with one line, which makes the drawing wide and low. The row that saves most width for the height it
 * costs gets one more, until the height and no longer the width decides the scale.
 */

export interface Box {
  width: number;
  height: number;
}

export interface Cell {
  row: number;
  column: number;
  nodes: number[];
}

export interface Gaps {
  /** Between nodes of a cell. */
  node: number;
  /** Least space between columns, and between rows. */
  column: number;
  row: number;
}

export interface Packing {
  /** Lines of every cell, in their order. */
  lines: number[][][];
  widths: Float64Array;
  heights: Map<number, number>;
  /** Scale at which everything fits with the least gaps, 1 at most. */
  scale: number;
}

export interface PackingInput {
  cells: Cell[];
  /** Nodes above all columns, in lines as long as the drawing is wide; their row is in no cell. */
  spread: Cell | null;
  columns: number;
  /** Least width of a column. */
  narrowest: number;
  box: (node: number) => Box;
  gaps: Gaps;
  available: Box;
}

export function pack(input: PackingInput): Packing {
  const measured = input.cells.map((cell) => new MeasuredCell(cell, input));
  const lineCount = new Map<number, number>();
  const mostLines = new Map<number, number>();
  for (const { cell } of measured) {
    lineCount.set(cell.row, 1);
    mostLines.set(cell.row, Math.max(mostLines.get(cell.row) ?? 1, cell.nodes.length));
  }
  let best = finished(input, measured, lineCount);
  let now = scaleOf(input, best);
  while (now.across < Math.min(1, now.down)) {
    const tops = topsOf(measured, lineCount, input);
    const rows = rowsToGrow(measured, lineCount, mostLines, tops);
    if (rows.length === 0) break;
    for (const row of new Set(rows)) lineCount.set(row, lineCount.get(row)! + 1);
    const next = finished(input, measured, lineCount);
    if (next.scale > best.scale) best = next;
    now = scaleOf(input, next);
  }
  return best;
}

/** A cell, and its least width with a number of lines. */
class MeasuredCell {
  private readonly known = new Map<number, number>();

  constructor(
    readonly cell: Cell,
    private readonly input: PackingInput,
  ) {}

  widthWith(lines: number): number {
    const count = Math.min(lines, this.cell.nodes.length);
    const known = this.known.get(count);
    if (known !== undefined) return known;
    const { box, gaps } = this.input;
    const widths = this.cell.nodes.map((node) => box(node).width);
    const total = widths.reduce((sum, width) => sum + width + gaps.node, -gaps.node);
    let low = Math.max(...widths, Math.floor(total / count));
    let high = total;
    while (high - low > 1) {
      const middle = (low + high) / 2;
      if (linesOf(this.cell.nodes, middle, this.input).length <= count) high = middle;
      else low = middle;
    }
    const width = linesOf(this.cell.nodes, low, this.input).length <= count ? low : high;
    this.known.set(count, width);
    return width;
  }
}

/** Lines of nodes, in their order, none wider than `width` unless a node is. */
export function linesOf(nodes: number[], width: number, { box, gaps }: Pick<PackingInput, "box" | "gaps">): number[][] {
  const lines: number[][] = [];
  let used = Infinity;
  for (const node of nodes) {
    const own = box(node).width + gaps.node;
    if (used + own > width + gaps.node + 1e-6) {
      lines.push([]);
      used = 0;
    }
    lines.at(-1)!.push(node);
    used += own;
  }
  return lines;
}

interface Tops {
  /** The widest cell of every column, and its width. */
  row: Int32Array;
  width: Float64Array;
  /** Width without that cell. */
  second: Float64Array;
}

function topsOf(cells: MeasuredCell[], lineCount: Map<number, number>, { columns, narrowest }: PackingInput): Tops {
  const tops = {
    row: new Int32Array(columns).fill(-2),
    width: new Float64Array(columns).fill(narrowest),
    second: new Float64Array(columns).fill(narrowest),
  };
  for (const measured of cells) {
    const { row, column } = measured.cell;
    const width = measured.widthWith(lineCount.get(row)!);
    if (width > tops.width[column]!) {
      tops.second[column] = tops.width[column]!;
      tops.width[column] = width;
      tops.row[column] = row;
    } else tops.second[column] = Math.max(tops.second[column]!, width);
  }
  return tops;
}

/** The row whose next line saves the most width; where several rows are as wide as each other, all of them. */
function rowsToGrow(
  cells: MeasuredCell[],
  lineCount: Map<number, number>,
  mostLines: Map<number, number>,
  tops: Tops,
): number[] {
  const saved = new Map<number, number>();
  for (const measured of cells) {
    const { row, column } = measured.cell;
    const lines = lineCount.get(row)!;
    if (tops.row[column] !== row || lines >= mostLines.get(row)!) continue;
    const width = Math.max(tops.second[column]!, measured.widthWith(lines + 1));
    saved.set(row, (saved.get(row) ?? 0) + tops.width[column]! - width);
  }
  const [row, most] = [...saved].reduce((best, entry) => (entry[1] > best[1] ? entry : best), [-2, 0]);
  if (most > 0.5) return [row];
  const able = cells.filter(
    ({ cell }) => lineCount.get(cell.row)! < Math.min(cell.nodes.length, mostLines.get(cell.row)!),
  );
  const column = able.reduce(
    (best, { cell }) => (tops.width[cell.column]! > tops.width[best]! ? cell.column : best),
    -1,
  );
  const tied = able.filter(
    (measured) =>
      measured.cell.column === column &&
      measured.widthWith(lineCount.get(measured.cell.row)!) >= tops.width[column]! - 0.5,
  );
  return tied.length ? tied.map(({ cell }) => cell.row) : able.slice(0, 1).map(({ cell }) => cell.row);
}

/** The packing with these numbers of lines; a cell has fewer where its column is wide enough. */
function finished(input: PackingInput, cells: MeasuredCell[], lineCount: Map<number, number>): Packing {
  const widths = topsOf(cells, lineCount, input).width.slice();
  const heights = new Map<number, number>();
  const lines = cells.map(({ cell }) => {
    const own = linesOf(cell.nodes, widths[cell.column]!, input);
    heights.set(cell.row, Math.max(heights.get(cell.row) ?? 0, heightOf(own, input)));
    return own;
  });
  const packing = { lines, widths, heights, scale: 0 };
  if (input.spread) {
    const own = linesOf(input.spread.nodes, totalOf(widths, input.gaps.column), input);
    heights.set(input.spread.row, heightOf(own, input));
  }
  const { across, down } = scaleOf(input, packing);
  packing.scale = Math.min(1, across, down);
  return packing;
}

/** Height of lines with the gaps between them. */
export function heightOf(lines: number[][], { box, gaps }: Pick<PackingInput, "box" | "gaps">): number {
  return lines.reduce((sum, line) => sum + lineHeight(line, box) + gaps.node, -gaps.node);
}

export function lineHeight(line: number[], box: (node: number) => Box): number {
  return Math.max(...line.map((node) => box(node).height));
}

const totalOf = (sizes: Iterable<number>, gap: number): number => [...sizes].reduce((sum, size) => sum + size + gap, 0);

function scaleOf({ gaps, available }: PackingInput, { widths, heights }: Packing): { across: number; down: number } {
  return {
    across: available.width / totalOf(widths, gaps.column),
    down: available.height / totalOf(heights.values(), gaps.row),
  };
}
