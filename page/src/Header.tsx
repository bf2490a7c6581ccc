/** The bar on top: which graph, search, undo, link, export, theme, help. */

import { useState } from "preact/hooks";
import { Icon, type IconName } from "./Icon";
import { Search } from "./Search";
import { ExportMenu } from "./ExportMenu";
import { useStore } from "./context";
import type { Theme } from "./url";

export function Header() {
  const store = useStore();
  const edits = store.edits.value;
  const next: Record<Theme, Theme> = { auto: "dark", dark: "light", light: "auto" };
  return (
    <header class="bar">
      <span class="brand">pycircuit</span>
      <GraphPicker />
      <Prompt />
      <Search />
      <div class="actions">
        <Action icon="undo" name="Undo" keys="Z" disabled={!edits?.can_undo} act={() => store.undo()} />
        <Action icon="redo" name="Redo" keys="⇧Z" disabled={!edits?.can_redo} act={() => store.redo()} />
        {store.graph.value !== null && <LinkButton />}
        {store.model.value && <ExportMenu />}
        <Action
          icon="theme"
          name={`Theme: ${store.theme.value}`}
          keys="D"
          act={() => (store.theme.value = next[store.theme.value])}
        />
        <Action icon="help" name="Keyboard" keys="?" act={() => (store.dialog.value = "help")} />
      </div>
    </header>
  );
}

interface ActionProps {
  icon: IconName;
  name: string;
  keys?: string;
  disabled?: boolean;
  /** Key that presses it. */
  press?: string;
  act: () => void;
}

/** A button with a picture, whose name is read out and shown by the pointer. */
export function Action({ icon, name, keys, disabled = false, press, act }: ActionProps) {
  return (
    <button
      class="action"
      aria-label={name}
      title={keys ? `${name} (${keys})` : name}
      disabled={disabled}
      data-key={press}
      onClick={act}
    >
      <Icon name={icon} />
    </button>
  );
}

function GraphPicker() {
  const store = useStore();
  const graphs = store.server.value?.graphs ?? [];
  if (graphs.length === 0) return null;
  return (
    <select
      class="picker"
      aria-label="Graph"
      value={store.graph.value ?? ""}
      onChange={(event) => void store.open(event.currentTarget.value)}
    >
      {graphs.map((graph) => (
        <option key={graph.name} value={graph.name} disabled={graph.error !== null}>
          {graph.error ? `${graph.name}: ${graph.error}` : graph.name}
        </option>
      ))}
    </select>
  );
}

function Prompt() {
  const store = useStore();
  const prompt = store.model.value?.view.prompt ?? "";
  return (
    <span class="prompt" title={prompt}>
      {prompt}
    </span>
  );
}

function LinkButton() {
  const store = useStore();
  const [copied, setCopied] = useState(false);
  const copy = async (): Promise<void> => {
    try {
      await navigator.clipboard.writeText(location.href);
      setCopied(true);
      window.setTimeout(() => setCopied(false), 1500);
      store.say("The link to this view is copied");
    } catch {
      store.say("Copy the address from the browser: it is the link to this view");
    }
  };
  return <Action icon="link" name={copied ? "Copied" : "Copy the link"} keys="C" press="c" act={() => void copy()} />;
}
