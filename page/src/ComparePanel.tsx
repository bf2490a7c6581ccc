/** Two graphs: what only one has, and how what both have changed. */

import { useEffect, useState } from "preact/hooks";
import { NodeName } from "./NodeName";
import { decimal, percent } from "./model";
import { messageOf } from "./store";
import { useStore } from "./context";
import { alignmentOf } from "./url";
import type { Comparison, GraphNode, OwnNode } from "./types";

type List = "both" | "only_a" | "only_b";

export function ComparePanel() {
  const store = useStore();
  const graph = store.graph.value;
  const other = store.other.value;
  const align = store.align.value;
  const { node, edge } = store.model.value?.view.thresholds ?? store.thresholds.value;
  const [answer, setAnswer] = useState<Comparison | null>(null);
  const [failure, setFailure] = useState<string | null>(null);
  useEffect(() => {
    setAnswer(null);
    setFailure(null);
    if (graph === null || other === null) return undefined;
    let open = true;
    const mark = (a: OwnNode[], b: OwnNode[]): void => {
      store.own.value = new Set(a.map(({ node }) => node.id));
      store.otherOwn.value = new Set(b.map(({ node }) => node.id));
    };
    const show = (comparison: Comparison): void => {
      if (!open) return;
      setAnswer(comparison);
      mark(comparison.only_a, comparison.only_b);
    };
    store.source
      .compare(graph, other, align, { node, edge })
      .then(show)
      .catch((error: unknown) => open && setFailure(messageOf(error)));
    return () => {
      open = false;
      mark([], []);
    };
  }, [store, graph, other, align, node, edge]);
  const others = (store.server.value?.graphs ?? []).filter((file) => file.name !== graph && !file.error);
  return (
    <div class="stack" data-testid="compare">
      <div class="form">
        <label>
          B
          <select
            aria-label="Graph to compare with"
            value={other ?? ""}
            onChange={(event) => (store.other.value = event.currentTarget.value || null)}
          >
            <option value="">Choose a graph</option>
            {others.map((file) => (
              <option key={file.name}>{file.name}</option>
            ))}
          </select>
        </label>
        <label>
          Same node
          <select
            value={align}
            aria-label="Which nodes are the same"
            onChange={(event) => (store.align.value = alignmentOf(event.currentTarget.value))}
          >
            <option value="position">feature and position</option>
            <option value="feature">feature</option>
            <option value="label">label, in two models</option>
          </select>
        </label>
      </div>
      {other === null && <p class="hint">A is the open graph. Choose B to see what they share.</p>}
      {failure !== null && (
        <p class="hint" role="alert">
          {failure}
        </p>
      )}
      {answer && <Answer answer={answer} a={graph!} b={other!} />}
    </div>
  );
}

function Answer({ answer, a, b }: { answer: Comparison; a: string; b: string }) {
  const store = useStore();
  const [list, setList] = useState<List>("both");
  const counts: Record<List, [string, number]> = {
    both: ["In both", answer.summary.both],
    only_a: ["Only in A", answer.summary.only_a],
    only_b: ["Only in B", answer.summary.only_b],
  };
  const total = Math.max(1, answer.summary.both + answer.summary.only_a + answer.summary.only_b);
  const changes = [...answer.both].sort((x, y) => Math.abs(y.influence_change) - Math.abs(x.influence_change));
  const largest = Math.max(1e-12, Math.abs(changes[0]?.influence_change ?? 0));
  return (
    <>
      <div
        class="overlap"
        role="img"
        aria-label={`${counts.only_a[1]} nodes only in A, ${counts.both[1]} in both, ${counts.only_b[1]} only in B`}
      >
        {(["only_a", "both", "only_b"] as const).map((name) => (
          <span key={name} class={name} style={{ width: `${(100 * counts[name][1]) / total}%` }} />
        ))}
      </div>
      <p class="hint">
        The graphs share {percent(answer.summary.similarity)} of the influence that either has. What only one of them
        has is <span class="own-mark">ringed</span> on its drawing.
      </p>
      <div class="segments" role="tablist" aria-label="Which nodes">
        {(["only_a", "both", "only_b"] as const).map((name) => (
          <button key={name} role="tab" aria-selected={list === name} onClick={() => setList(name)}>
            {counts[name][0]} <b>{counts[name][1]}</b>
          </button>
        ))}
      </div>
      {list === "both" ? (
        <ul class="connections" data-testid="both">
          {changes.slice(0, 100).map(({ a: node, influence_change: change }) => (
            <li key={node.id}>
              <button class={`line ${change < 0 ? "negative" : "positive"}`} onClick={() => store.select(node.id)}>
                <span class="meter" style={{ width: `${(100 * Math.abs(change)) / largest}%` }} />
                <NodeName node={node} />
                <span class="value">
                  {change < 0 ? "" : "+"}
                  {decimal(change)}
                </span>
              </button>
            </li>
          ))}
        </ul>
      ) : (
        <OnlyIn nodes={answer[list]} open={list === "only_a" ? a : b} />
      )}
    </>
  );
}

function OnlyIn({ nodes, open }: { nodes: OwnNode[]; open: string }) {
  const store = useStore();
  const choose = async (node: GraphNode): Promise<void> => {
    const before = store.graph.value;
    if (open !== before) {
      await store.open(open);
      store.other.value = before;
    }
    store.select(node.id);
  };
  return (
    <ul class="connections">
      {nodes.slice(0, 100).map(({ node, influence }) => (
        <li key={node.id}>
          <button class="line positive" onClick={() => void choose(node)}>
            <span class="meter" style={{ width: `${(100 * influence) / Math.max(1e-12, nodes[0]!.influence)}%` }} />
            <NodeName node={node} />
            <span class="value">{decimal(influence)}</span>
          </button>
        </li>
      ))}
    </ul>
  );
}
