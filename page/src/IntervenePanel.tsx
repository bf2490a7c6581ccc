/** Interventions: what to change, what to hold, and what came of it. */

import { useState } from "preact/hooks";
import { Icon } from "./Icon";
import { NodeName } from "./NodeName";
import { RunOr, useTraceRun } from "./TraceRun";
import { Agreement } from "./Agreement";
import { decimal, nodeName, percent, visibleText } from "./model";
import { useStore } from "./context";
import type { Store } from "./store";
import type { Change, Intervened, TokenProbability } from "./types";

type Kind = "ablate" | "scale" | "value";

interface Draft {
  name: string;
  nodes: string[];
  kind: Kind;
  amount: string;
  everywhere: boolean;
}

const FREEZES: [string, string][] = [
  ["attention", "Attention patterns and norms"],
  ["patterns", "Attention patterns"],
  ["all", "Everything but the direct effect"],
  ["none", "Nothing"],
];

export function IntervenePanel() {
  const store = useStore();
  const [drafts, setDrafts] = useState<Draft[]>([]);
  const [freeze, setFreeze] = useState("attention");
  const [generate, setGenerate] = useState(0);
  const [result, setResult] = useState<Intervened | null>(null);
  const [busy, setBusy] = useState(false);
  const after = useTraceRun((name) => {
    store.other.value = name;
    store.show("compare");
    return Promise.resolve();
  });
  const run = async (): Promise<void> => {
    setBusy(true);
    try {
      setResult(await store.source.intervene(store.graph.value!, drafts.map(changeOf), freeze, generate));
    } catch (error) {
      store.report(error);
    } finally {
      setBusy(false);
    }
  };
  const edit = (index: number, part: Partial<Draft>): void =>
    setDrafts(drafts.map((draft, i) => (i === index ? { ...draft, ...part } : draft)));
  return (
    <div class="stack" data-testid="intervene">
      <AddChange add={(draft) => setDrafts([...drafts.filter((other) => other.name !== draft.name), draft])} />
      {drafts.map((draft, i) => (
        <DraftRow
          key={draft.name}
          draft={draft}
          edit={(part) => edit(i, part)}
          remove={() => setDrafts(drafts.filter((_, j) => j !== i))}
        />
      ))}
      <div class="form">
        <label>
          Hold
          <select value={freeze} onChange={(event) => setFreeze(event.currentTarget.value)}>
            {FREEZES.map(([value, text]) => (
              <option key={value} value={value}>
                {text}
              </option>
            ))}
          </select>
        </label>
        <label>
          Tokens to write
          <input
            type="number"
            min={0}
            max={64}
            value={generate}
            aria-label="Tokens to generate"
            onInput={(event) => setGenerate(Number(event.currentTarget.value))}
          />
        </label>
        <button class="primary" disabled={busy || drafts.length === 0} onClick={() => void run()}>
          {busy ? "Running…" : "Run"}
        </button>
      </div>
      {drafts.length > 0 && (
        <RunOr run={after}>
          <button
            class="small"
            title="Trace the prompt under these changes, and compare the graphs"
            onClick={() => void after.start(() => store.source.traceAfter(store.graph.value!, drafts.map(changeOf)))}
          >
            Trace and compare
          </button>
        </RunOr>
      )}
      {result && <Outcome result={result} />}
    </div>
  );
}

function changeOf(draft: Draft): Change {
  const change: Change = { nodes: draft.nodes, everywhere: draft.everywhere };
  if (draft.kind === "ablate") return { ...change, ablate: true };
  return { ...change, [draft.kind]: Number(draft.amount) };
}

/** The node or group that can be added now. */
function candidate(store: Store): { name: string; nodes: string[] } | null {
  const node = store.detail.value?.node;
  if (store.chosen.value.length > 1)
    return { name: `${store.chosen.value.length} chosen nodes`, nodes: store.chosen.value };
  return node?.kind === "feature"
    ? { name: `${nodeName(node, store.document.value.labels)} ${node.id}`, nodes: [node.id] }
    : null;
}

function AddChange({ add }: { add: (draft: Draft) => void }) {
  const store = useStore();
  const now = candidate(store);
  const groups = store.document.value.groups;
  const draft = (name: string, nodes: string[]): Draft => ({
    name,
    nodes,
    kind: "ablate",
    amount: "2",
    everywhere: false,
  });
  return (
    <section aria-label="What to change">
      <h3>Change</h3>
      <div class="row wrap">
        <button class="small" disabled={!now} onClick={() => now && add(draft(now.name, now.nodes))}>
          <Icon name="plus" /> {now ? now.name : "Select a feature"}
        </button>
        {groups.map((group) => (
          <button key={group.name} class="small" onClick={() => add(draft(group.name, group.nodes))}>
            <Icon name="plus" /> {group.name} ×{group.nodes.length}
          </button>
        ))}
      </div>
    </section>
  );
}

interface DraftProps {
  draft: Draft;
  edit: (part: Partial<Draft>) => void;
  remove: () => void;
}

function DraftRow({ draft, edit, remove }: DraftProps) {
  return (
    <fieldset class="draft" data-testid="change">
      <legend>{draft.name}</legend>
      <select
        aria-label={`Change of ${draft.name}`}
        value={draft.kind}
        onChange={(event) => edit({ kind: event.currentTarget.value as Kind })}
      >
        <option value="ablate">ablate</option>
        <option value="scale">scale by</option>
        <option value="value">set to</option>
      </select>
      {draft.kind !== "ablate" && (
        <input
          type="number"
          step="any"
          aria-label="Amount"
          value={draft.amount}
          onInput={(event) => edit({ amount: event.currentTarget.value })}
        />
      )}
      <label class="check">
        <input
          type="checkbox"
          checked={draft.everywhere}
          onChange={(event) => edit({ everywhere: event.currentTarget.checked })}
        />
        everywhere
      </label>
      <button class="action" aria-label={`Remove ${draft.name}`} onClick={remove}>
        <Icon name="close" />
      </button>
    </fieldset>
  );
}

function Outcome({ result }: { result: Intervened }) {
  const store = useStore();
  const model = store.model.value;
  return (
    <div class="outcome" data-testid="outcome">
      <h3>Next token</h3>
      <Probabilities before={result.before} after={result.after} />
      {result.notes.map((note) => (
        <p key={note} class="hint">
          {note}
        </p>
      ))}
      {result.nodes.length > 0 && (
        <>
          <h3>Pinned nodes: predicted and measured change</h3>
          <Agreement result={result} />
          <table class="changes">
            <thead>
              <tr>
                <th>Node</th>
                <th class="number">before</th>
                <th class="number">after</th>
                <th class="number">predicted</th>
              </tr>
            </thead>
            <tbody>
              {result.nodes.map(({ id, before, after, predicted }) => {
                const node = model?.node(id);
                return (
                  <tr key={id}>
                    <td>{node ? <NodeName node={node} id={false} /> : <span class="mono">{id}</span>}</td>
                    <td class="number">{decimal(before)}</td>
                    <td class="number">{decimal(after)}</td>
                    <td class="number">{decimal(predicted)}</td>
                  </tr>
                );
              })}
            </tbody>
          </table>
        </>
      )}
      {result.text && (
        <>
          <h3>Text</h3>
          <dl class="texts">
            <dt>without</dt>
            <dd>{result.text.before}</dd>
            <dt>with</dt>
            <dd>{result.text.after}</dd>
          </dl>
        </>
      )}
    </div>
  );
}

function Probabilities({ before, after }: { before: TokenProbability[]; after: TokenProbability[] }) {
  const find = (list: TokenProbability[], token: string): number =>
    list.find((entry) => entry.token === token)?.probability ?? 0;
  const likeliest = (list: TokenProbability[]): TokenProbability[] =>
    [...list].sort((a, b) => b.probability - a.probability).slice(0, 6);
  const tokens = [...new Set([...likeliest(before), ...likeliest(after)].map((entry) => entry.token))];
  tokens.sort((a, b) => Math.max(find(before, b), find(after, b)) - Math.max(find(before, a), find(after, a)));
  return (
    <table class="probabilities">
      <thead class="visually-hidden">
        <tr>
          <th>Token</th>
          <th>Before and after</th>
          <th>Before</th>
          <th>After</th>
        </tr>
      </thead>
      <tbody>
        {tokens.slice(0, 8).map((token) => {
          const [p, q] = [find(before, token), find(after, token)];
          return (
            <tr key={token}>
              <th scope="row">{visibleText(token)}</th>
              <td class="bars">
                <span class="before" style={{ width: `${100 * p}%` }} />
                <span class={q >= p ? "after positive" : "after negative"} style={{ width: `${100 * q}%` }} />
              </td>
              <td class="number quiet">{percent(p)}</td>
              <td class="number">{percent(q)}</td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}
