/** The card of a feature: tokens it raises and lowers, texts it is active on, and its histogram. */

import { useEffect, useState } from "preact/hooks";
import { decimal, visibleText } from "./model";
import { useStore } from "./context";
import { messageOf } from "./store";
import type { Card, Example, GraphNode, TokenValue } from "./types";

export function FeatureCard({ node }: { node: GraphNode }) {
  const store = useStore();
  const [card, setCard] = useState<Card | null>(null);
  const [failure, setFailure] = useState<string | null>(null);
  const graph = store.graph.value!;
  useEffect(() => {
    let open = true;
    store.source
      .card(graph, node.layer, node.feature!)
      .then((answer) => open && setCard(answer))
      .catch((error: unknown) => open && setFailure(messageOf(error)));
    return () => {
      open = false;
    };
  }, [store, graph, node.layer, node.feature]);
  return (
    <section class="card" aria-label="Feature card" data-testid="card">
      <ActiveHere node={node} here={card?.here ?? []} />
      {failure !== null && <p class="hint">No card: {failure}</p>}
      {card && <CardContent card={card} />}
    </section>
  );
}

function CardContent({ card }: { card: Card }) {
  return (
    <>
      {card.raised.length + card.lowered.length > 0 && (
        <>
          <h3>Tokens it promotes</h3>
          <Tokens list={card.raised} sign="positive" />
          <h3>Tokens it suppresses</h3>
          <Tokens list={card.lowered} sign="negative" />
        </>
      )}
      {card.histogram && <Histogram {...card.histogram} />}
      {card.examples.length > 0 && <h3>Where it is active</h3>}
      {card.examples.map((example, i) => (
        <ExampleText key={i} example={example} heading={example.quantile !== card.examples[i - 1]?.quantile} />
      ))}
    </>
  );
}

/** The prompt with the tokens on which the feature is active. */
function ActiveHere({ node, here }: { node: GraphNode; here: Card["here"] }) {
  const store = useStore();
  const view = store.model.value?.view;
  if (!view) return null;
  const active = new Map(here.map(({ position, value }) => [position, value]));
  if (node.value !== null) active.set(node.position, node.value);
  const highest = Math.max(1e-12, ...active.values());
  const gap = view.tokens.some((token) => /^\s/.test(token)) ? "" : " "; // between tokens that bring no spaces
  const around = view.tokens.length > 80 ? [Math.max(0, node.position - 30), node.position + 10] : [0, Infinity];
  return (
    <>
      <h3>In this prompt</h3>
      <p class="text">
        {view.tokens.map((token, position) => {
          if (position < around[0]! || position > around[1]!) return null;
          const value = active.get(position);
          return value !== undefined ? (
            <span key={position}>
              <mark class={heat(value / highest)} title={decimal(value)}>
                {token}
              </mark>
              {gap}
            </span>
          ) : (
            <span key={position}>{token + gap}</span>
          );
        })}
      </p>
    </>
  );
}

function Tokens({ list, sign }: { list: TokenValue[]; sign: "positive" | "negative" }) {
  return (
    <p class={`chips ${sign}`}>
      {list.slice(0, 10).map(({ token, value }, i) => (
        <span key={i} title={decimal(value)}>
          {visibleText(token)}
        </span>
      ))}
    </p>
  );
}

/** Class of a highlight, h0 to h5. */
export function heat(share: number): string {
  return `h${Math.max(0, Math.min(5, Math.ceil(5 * share)))}`;
}

function ExampleText({ example, heading }: { example: Example; heading: boolean }) {
  const highest = Math.max(1e-12, ...example.values);
  const peak = example.values.indexOf(Math.max(...example.values));
  const first = Math.max(0, peak - 24);
  const gap = example.tokens.some((token) => /^\s/.test(token)) ? "" : " ";
  return (
    <>
      {heading && example.quantile && <h4>{example.quantile}</h4>}
      <p class="text example">
        {first > 0 && "…"}
        {example.tokens.slice(first, peak + 12).map((token, i) => {
          const value = example.values[first + i] ?? 0;
          return (
            <span key={i} class={value > 0 ? heat(value / highest) : ""} title={value > 0 ? decimal(value) : undefined}>
              {token}
              {gap}
            </span>
          );
        })}
      </p>
    </>
  );
}

function Histogram({ edges, counts }: { edges: number[]; counts: number[] }) {
  const highest = Math.max(1, ...counts.map((count) => Math.log1p(count)));
  const step = 240 / Math.max(1, counts.length);
  return (
    <figure class="histogram">
      <figcaption>Activations, log counts</figcaption>
      <svg
        viewBox="0 0 240 44"
        role="img"
        aria-label={`Histogram of activations from ${decimal(edges[0])} to ${decimal(edges.at(-1))}`}
      >
        {counts.map((count, i) => {
          const height = (40 * Math.log1p(count)) / highest;
          return (
            <rect key={i} x={i * step} y={42 - height} width={Math.max(1, step - 1)} height={height}>
              <title>{`${decimal(edges[i])} to ${decimal(edges[i + 1])}: ${count}`}</title>
            </rect>
          );
        })}
      </svg>
      <div class="ends">
        <span>{decimal(edges[0])}</span>
        <span>{decimal(edges.at(-1))}</span>
      </div>
    </figure>
  );
}
