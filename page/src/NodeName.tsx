/** A node's name with its kind as a shape and its identifier. */

import { featureKey, nodeName } from "./model";
import { useStore } from "./context";
import type { GraphNode } from "./types";

export function NodeName({ node, id = true }: { node: GraphNode; id?: boolean }) {
  const store = useStore();
  const labels = store.document.value.labels;
  const automatic = node.kind === "feature" && node.automatic && !labels[featureKey(node)];
  return (
    <span class="node-name">
      <span class={`shape ${node.kind}`} aria-hidden="true" />
      <span class={automatic ? "label automatic" : "label"} title={automatic ? "automatic label" : undefined}>
        {nodeName(node, labels)}
      </span>
      {id && <span class="mono">{node.id}</span>}
    </span>
  );
}
