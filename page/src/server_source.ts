/** Graphs from the server that sent this page. */

import type { Source } from "./source";
import type {
  Card,
  Change,
  Comparison,
  EditDocument,
  Edits,
  Estimate,
  GraphNode,
  Group,
  Intervened,
  NodeDetail,
  ServerState,
  StrongPath,
  Edges,
  Scores,
  TraceEvent,
  Thresholds,
  TraceRequest,
  View,
} from "./types";

/** An answer of the server that is an error; status 409 is an edit of an old revision. */
export class ServerError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

async function answer(path: string, init: RequestInit = {}): Promise<Response> {
  const response = await fetch(`api/${path}`, { credentials: "same-origin", ...init });
  if (response.ok) return response;
  const text = await response.text();
  throw new ServerError(errorText(text) ?? `${response.status} ${response.statusText}`, response.status);
}

/** The `error` of a JSON answer, or null. */
export function errorText(text: string): string | null {
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === "object" && value !== null && "error" in value && typeof value.error === "string")
      return value.error;
  } catch {
    return null;
  }
  return null;
}

async function get<T>(path: string, query: Record<string, string | number> = {}, signal?: AbortSignal): Promise<T> {
  const text = new URLSearchParams(Object.entries(query).map(([key, value]) => [key, String(value)])).toString();
  const response = await answer(text ? `${path}?${text}` : path, signal ? { signal } : {});
  return (await response.json()) as T;
}

async function send<T>(method: string, path: string, body?: unknown): Promise<T> {
  const init: RequestInit = { method, headers: { "X-Pycircuit": "1", "Content-Type": "application/json" } };
  if (body !== undefined) init.body = JSON.stringify(body);
  return (await (await answer(path, init)).json()) as T;
}

const graphPath = (name: string, rest = ""): string => `graphs/${encodeURIComponent(name)}${rest}`;

export class ServerSource implements Source {
  readonly live = true;

  state(): Promise<ServerState> {
    return get("state");
  }

  view(name: string, node: number | null, edge: number | null, signal?: AbortSignal): Promise<View> {
    const thresholds = node === null || edge === null ? {} : { node_threshold: node, edge_threshold: edge };
    return get(graphPath(name), { ...thresholds, max_nodes: 10000 }, signal);
  }

  node(name: string, id: string): Promise<NodeDetail> {
    return get(graphPath(name, "/node"), { id, limit: 100 });
  }

  async paths(name: string, source: string, target: string, count: number): Promise<StrongPath[]> {
    return (await get<{ paths: StrongPath[] }>(graphPath(name, "/paths"), { source, target, k: count })).paths;
  }

  search(name: string, text: string): Promise<{ nodes: GraphNode[]; total: number }> {
    return get(graphPath(name, "/search"), { q: text });
  }

  edges(name: string, nodes: string[]): Promise<Edges> {
    return send("POST", graphPath(name, "/edges"), { nodes });
  }

  scores(name: string, nodes: string[]): Promise<Scores> {
    return send("POST", graphPath(name, "/scores"), { nodes });
  }

  async group(name: string, nodes: string[], fixed: Record<string, string[]>): Promise<Group[]> {
    const reply = await send<{ groups: { name: string; nodes: string[] }[] }>("POST", graphPath(name, "/group"), {
      nodes,
      fixed,
    });
    return reply.groups.map((group) => ({ ...group, collapsed: true }));
  }

  edits(name: string): Promise<Edits> {
    return get(graphPath(name, "/edits"));
  }

  putEdits(name: string, revision: number, document: EditDocument): Promise<Edits> {
    return send("PUT", graphPath(name, "/edits"), { revision, document });
  }

  undo(name: string, revision: number): Promise<Edits> {
    return send("POST", graphPath(name, "/edits/undo"), { revision });
  }

  redo(name: string, revision: number): Promise<Edits> {
    return send("POST", graphPath(name, "/edits/redo"), { revision });
  }

  importLink(name: string, text: string): Promise<Edits> {
    return send("POST", graphPath(name, "/import"), { text });
  }

  async exported(name: string, flavour: string): Promise<string> {
    return (await answer(`${graphPath(name, "/export.json")}?flavour=${encodeURIComponent(flavour)}`)).text();
  }

  card(name: string, layer: number, feature: number): Promise<Card> {
    return get(`features/${layer}/${feature}`, { graph: name });
  }

  intervene(name: string, changes: Change[], freeze: string, generate: number): Promise<Intervened> {
    return send("POST", graphPath(name, "/intervene"), { changes, freeze, generate });
  }

  compare(a: string, b: string, align: string, { node, edge }: Thresholds): Promise<Comparison> {
    return get("compare", { a, b, align, node_threshold: node, edge_threshold: edge });
  }

  estimate(request: TraceRequest): Promise<Estimate> {
    return send("POST", "estimate", request);
  }

  async trace(request: TraceRequest): Promise<string> {
    return (await send<{ id: string }>("POST", "traces", request)).id;
  }

  async traceAfter(name: string, changes: Change[]): Promise<string> {
    return (await send<{ id: string }>("POST", graphPath(name, "/trace-after"), { changes })).id;
  }

  watchTrace(id: string, listener: (event: TraceEvent) => void): () => void {
    const events = new EventSource(`api/traces/${encodeURIComponent(id)}/events`);
    const stop = (): void => events.close();
    events.onmessage = (message: MessageEvent<string>) => {
      const event = JSON.parse(message.data) as TraceEvent;
      if (event.graph || event.error || event.cancelled) stop();
      listener(event);
    };
    events.onerror = () => {
      if (events.readyState === EventSource.CLOSED) listener({ error: "the server closed the connection" });
    };
    return stop;
  }

  async cancelTrace(id: string): Promise<void> {
    await send("DELETE", `traces/${encodeURIComponent(id)}`);
  }
}
