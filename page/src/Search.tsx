/** Search over labels, tokens and identifiers, in the complete graph. */

import { useEffect, useRef, useState } from "preact/hooks";
import { Icon } from "./Icon";
import { NodeName } from "./NodeName";
import { useStore } from "./context";
import type { GraphNode } from "./types";

export function Search() {
  const store = useStore();
  const [text, setText] = useState("");
  const [answer, setAnswer] = useState<{ nodes: GraphNode[]; total: number } | null>(null);
  const [current, setCurrent] = useState(0);
  const input = useRef<HTMLInputElement>(null);
  const graph = store.graph.value;
  useEffect(() => {
    if (graph === null || text.trim() === "") {
      setAnswer(null);
      return undefined;
    }
    let open = true;
    const timer = window.setTimeout(() => {
      store.source
        .search(graph, text)
        .then((found) => {
          if (!open) return;
          setAnswer(found);
          setCurrent(0);
        })
        .catch((error: unknown) => store.report(error));
    }, 90);
    return () => {
      open = false;
      window.clearTimeout(timer);
    };
  }, [store, graph, text]);
  const choose = (node: GraphNode | undefined): void => {
    if (!node) return;
    store.select(node.id);
    store.show("node");
    setText("");
    input.current?.blur();
  };
  const onKey = (event: KeyboardEvent): void => {
    const count = answer?.nodes.length ?? 0;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      setCurrent((now) => (count ? (now + (event.key === "ArrowDown" ? 1 : count - 1)) % count : 0));
    } else if (event.key === "Enter") choose(answer?.nodes[current]);
    else if (event.key === "Escape") {
      setText("");
      input.current?.blur();
    }
  };
  return (
    <div class="search">
      <Icon name="search" />
      <input
        ref={input}
        type="text"
        placeholder="Search labels, tokens, 3/412"
        aria-label="Search nodes"
        role="combobox"
        aria-expanded={answer !== null}
        aria-controls="search-results"
        aria-activedescendant={answer?.nodes.length ? `result-${current}` : undefined}
        data-key="/"
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={onKey}
      />
      <kbd>/</kbd>
      {answer && <Results answer={answer} current={current} choose={choose} />}
    </div>
  );
}

interface ResultsProps {
  answer: { nodes: GraphNode[]; total: number };
  current: number;
  choose: (node: GraphNode) => void;
}

function Results({ answer, current, choose }: ResultsProps) {
  const store = useStore();
  const more = answer.total - answer.nodes.length;
  return (
    <ul class="results" id="search-results" role="listbox" aria-label="Results">
      {answer.nodes.length === 0 && <li class="none">Nothing matches</li>}
      {answer.nodes.map((node, i) => (
        <li
          key={node.id}
          id={`result-${i}`}
          role="option"
          aria-selected={i === current}
          onMouseDown={(event) => {
            event.preventDefault();
            choose(node);
          }}
          onMouseEnter={() => (store.hovered.value = node.id)}
          onMouseLeave={() => (store.hovered.value = null)}
        >
          <NodeName node={node} />
          {!store.model.value?.byId.has(node.id) && <span class="quiet">pruned</span>}
        </li>
      ))}
      {more > 0 && <li class="none">and {more} more</li>}
    </ul>
  );
}
