/** A scatter of the changes that the graph foretold against those that were measured. */

import { decimal, percent } from "./model";
import type { Intervened } from "./types";

export function Agreement({ result }: { result: Intervened }) {
  const points = result.nodes.flatMap(({ id, changed, change, foretold }) =>
    changed || change === null || foretold === null ? [] : [{ id, x: foretold, y: change }],
  );
  if (points.length === 0) return null;
  const reach = Math.max(1e-9, ...points.flatMap(({ x, y }) => [Math.abs(x), Math.abs(y)]));
  const place = (value: number): number => 60 + (52 * value) / reach;
  const { agreement } = result;
  return (
    <figure class="agreement">
      <svg viewBox="0 0 120 120" role="img" aria-label="Predicted against measured changes">
        <path d="M60 4V116M4 60H116" class="axis" />
        <path d="M8 112L112 8" class="equal" />
        {points.map(({ id, x, y }) => (
          <circle key={id} cx={place(x)} cy={120 - place(y)} r={3}>
            <title>{`${id}: predicted ${decimal(x)}, measured ${decimal(y)}`}</title>
          </circle>
        ))}
      </svg>
      <figcaption>
        {agreement?.correlation !== null && agreement?.correlation !== undefined && (
          <span>
            correlation <b>{agreement.correlation.toFixed(2)}</b>
          </span>
        )}
        {agreement?.sign !== null && agreement?.sign !== undefined && (
          <span>
            same sign <b>{percent(agreement.sign)}</b>
          </span>
        )}
        <span class="hint">across: predicted, up: measured; on the line they agree</span>
      </figcaption>
    </figure>
  );
}
