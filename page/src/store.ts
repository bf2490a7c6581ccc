/** State of one page: what it shows, what is selected, and the edits, each a signal. */

import { batch, computed, effect, signal } from "@preact/signals";
import type { Camera } from "./camera";
import { GraphModel, SHOW_ALL, type Filter } from "./model";
import { EditQueue } from "./edit_queue";
import { NEW_ADDRESS, readAddress, writeAddress, type Address, type Alignment, type Tab, type Theme } from "./url";
import { EMPTY_DOCUMENT, type Source } from "./source";
import type { EditDocument, Edits, NodeDetail, ServerState, StrongPath, View } from "./types";

export interface Notice {
  text: string;
  error: boolean;
}

export class Store {
  readonly server = signal<ServerState | null>(null);
  readonly graph = signal<string | null>(null);
  readonly model = signal<GraphModel | null>(null);
  readonly loading = signal(false);
  readonly failure = signal<string | null>(null);
  readonly thresholds = signal({ node: 0.8, edge: 0.98 });
  readonly filter = signal<Filter>(SHOW_ALL);
  readonly selected = signal<string | null>(null);
  readonly detail = signal<NodeDetail | null>(null);
  readonly hovered = signal<string | null>(null);
  /** Nodes chosen together, for a group. */
  readonly chosen = signal<string[]>([]);
  readonly pathEnds = signal<{ from: string | null; to: string | null }>({ from: null, to: null });
  readonly paths = signal<StrongPath[] | null>(null);
  readonly tab = signal<Tab>("node");
  readonly theme = signal<Theme>("auto");
  readonly edits = signal<Edits | null>(null);
  readonly other = signal<string | null>(null);
  /** Nodes that the graph which this one is compared with lacks. */
  readonly own = signal<ReadonlySet<string>>(new Set());
  readonly otherOwn = signal<ReadonlySet<string>>(new Set());
  readonly align = signal<Alignment>("position");
  readonly camera = signal<Camera | null>(null);
  readonly dialog = signal<"help" | "import" | "list" | null>(null);
  readonly notice = signal<Notice | null>(null);
  readonly document = computed<EditDocument>(() => this.edits.value?.document ?? EMPTY_DOCUMENT);
  readonly serverModel = computed(() => this.server.value?.model ?? null);

  private readonly queue: EditQueue;
  private request: AbortController | null = null;
  private noticeTimer = 0;
  private timer = 0;
  /** True once a link or a slider chose the thresholds; until then the graph does. */
  private thresholdsChosen = false;
  /** True once a link or a toggle chose whether errors are shown; until then the graph does. */
  private errorsChosen = false;

  constructor(
    readonly source: Source,
    readonly root: HTMLElement,
    private readonly usesAddress: boolean,
  ) {
    this.queue = new EditQueue(source, this.edits, (error) => this.report(error));
  }

  async start(): Promise<void> {
    const address = this.usesAddress ? readAddress(location.hash) : NEW_ADDRESS;
    this.applyAddress(address);
    effect(() => this.writeAddress());
    effect(() => void this.loadDetail(this.graph.value, this.selected.value));
    effect(() => void this.loadPaths(this.graph.value, this.pathEnds.value.from, this.pathEnds.value.to));
    if (this.usesAddress) window.addEventListener("hashchange", () => this.onHash());
    const opened = address.graph === null ? null : this.open(address.graph, address.edits);
    await Promise.all([this.refreshState(), opened]);
    if (opened) return;
    const name = this.server.value?.graphs.find((graph) => !graph.error)?.name ?? null;
    if (name) await this.open(name, address.edits);
    else this.tab.value = "trace";
  }

  async refreshState(): Promise<void> {
    try {
      this.server.value = await this.source.state();
    } catch (error) {
      this.failure.value = `The server does not answer: ${messageOf(error)}`;
    }
  }

  /** Open a graph and its edits. */
  async open(name: string, embeddedEdits: string | null = null): Promise<void> {
    batch(() => {
      if (this.graph.value !== null && this.graph.value !== name) this.forget();
      this.graph.value = name;
    });
    await Promise.all([this.load(), this.queue.load(name, embeddedEdits)]);
  }

  private forget(): void {
    this.selected.value = null;
    this.detail.value = null;
    this.hovered.value = null;
    this.chosen.value = [];
    this.thresholdsChosen = false;
    this.pathEnds.value = { from: null, to: null };
    this.camera.value = null;
    this.model.value = null;
    this.edits.value = null;
  }

  private async load(): Promise<void> {
    const name = this.graph.value;
    if (name === null) return;
    this.request?.abort();
    const request = new AbortController();
    this.request = request;
    this.loading.value = true;
    try {
      const { node, edge } = this.thresholds.value;
      const chosen = this.thresholdsChosen;
      const view = await this.source.view(name, chosen ? node : null, chosen ? edge : null, request.signal);
      if (request.signal.aborted) return;
      batch(() => {
        if (!chosen) this.thresholds.value = view.thresholds;
        if (!chosen && !this.errorsChosen) this.filter.value = { ...this.filter.value, errors: showsErrors(view) };
        this.model.value = new GraphModel(view);
        this.failure.value = null;
      });
    } catch (error) {
      if (request.signal.aborted) return;
      this.failure.value = messageOf(error);
    } finally {
      if (this.request === request) this.loading.value = false;
    }
  }

  /** Set the thresholds; the graph is pruned anew once they rest for a moment. */
  prune(node: number, edge: number): void {
    this.chooseThresholds(node, edge);
    window.clearTimeout(this.timer);
    this.timer = window.setTimeout(() => void this.load(), 120);
  }

  chooseThresholds(node: number, edge: number): void {
    this.thresholds.value = { node, edge };
    this.thresholdsChosen = true;
  }

  private async loadDetail(name: string | null, id: string | null): Promise<void> {
    if (name === null || id === null) {
      this.detail.value = null;
      return;
    }
    try {
      const detail = await this.source.node(name, id);
      if (this.selected.peek() === id && this.graph.peek() === name) this.detail.value = detail;
    } catch (error) {
      this.report(error);
    }
  }

  private async loadPaths(name: string | null, from: string | null, to: string | null): Promise<void> {
    if (name === null || from === null || to === null) {
      this.paths.value = null;
      return;
    }
    try {
      this.paths.value = await this.source.paths(name, from, to, 5);
    } catch (error) {
      this.report(error);
    }
  }

  /** Show or hide a kind of node or edge. */
  toggle(name: keyof Omit<Filter, "density">): void {
    if (name === "errors") this.errorsChosen = true;
    this.filter.value = { ...this.filter.value, [name]: !this.filter.value[name] };
  }

  select(id: string | null): void {
    this.selected.value = id;
  }

  show(tab: Tab): void {
    this.tab.value = tab;
  }

  /** Change the edits: at once on the page, and then on the server. */
  change(edit: (document: EditDocument) => void): void {
    const name = this.graph.value;
    if (name !== null) this.queue.change(name, edit);
  }

  undo(): void {
    if (this.graph.value !== null && this.edits.value?.can_undo) this.queue.step(this.graph.value, "undo");
  }

  redo(): void {
    if (this.graph.value !== null && this.edits.value?.can_redo) this.queue.step(this.graph.value, "redo");
  }

  adopt(edits: Edits): void {
    this.edits.value = edits;
  }

  say(text: string, error = false): void {
    this.notice.value = { text, error };
    window.clearTimeout(this.noticeTimer);
    this.noticeTimer = window.setTimeout(() => (this.notice.value = null), error ? 9000 : 3500);
  }

  report(error: unknown): void {
    this.say(messageOf(error), true);
  }

  address(): Address {
    const camera = this.camera.value;
    return {
      graph: this.graph.value,
      ...(this.model.value ? this.thresholds.value : { node: null, edge: null }),
      selected: this.selected.value,
      tab: this.tab.value,
      filter: this.filter.value,
      pathFrom: this.pathEnds.value.from,
      pathTo: this.pathEnds.value.to,
      other: this.other.value,
      align: this.align.value,
      camera: camera ? [camera.k, camera.dx, camera.dy] : null,
      edits: this.source.live ? null : this.queue.embedded(),
    };
  }

  private applyAddress(address: Address): void {
    batch(() => {
      const { node, edge } = address;
      this.thresholdsChosen = false;
      if (node !== null && edge !== null) this.chooseThresholds(node, edge);
      this.errorsChosen = (node !== null && edge !== null) || !address.filter.errors;
      this.selected.value = address.selected;
      this.tab.value = address.tab;
      this.filter.value = address.filter;
      this.pathEnds.value = { from: address.pathFrom, to: address.pathTo };
      this.other.value = address.other;
      this.align.value = address.align;
      this.camera.value = address.camera
        ? { k: address.camera[0], dx: address.camera[1], dy: address.camera[2] }
        : null;
    });
  }

  private writeAddress(): void {
    const text = writeAddress(this.address());
    if (this.usesAddress && this.graph.value !== null && text !== location.hash.slice(1))
      history.replaceState(null, "", `#${text}`);
  }

  private onHash(): void {
    const address = readAddress(location.hash);
    const before = this.thresholds.value;
    const opens = address.graph !== null && address.graph !== this.graph.value;
    if (opens) {
      this.forget();
      this.graph.value = address.graph;
    }
    this.applyAddress(address);
    if (opens) void this.open(address.graph!, address.edits);
    else if (before.node !== address.node || before.edge !== address.edge) void this.load();
  }
}

/** Errors are shown at first unless they would outnumber the features. */
function showsErrors(view: View): boolean {
  const count = (kind: string): number => view.nodes.filter((node) => node.kind === kind).length;
  return count("error") <= count("feature");
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
