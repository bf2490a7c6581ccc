/** Entry of the page: on the server's page, in a file by itself, or as a notebook's widget. */

import "./style.css";
import { render as renderInto } from "preact";
import { App } from "./App";
import { EmbeddedSource, type Embedded } from "./embedded_source";
import { ServerSource } from "./server_source";
import type { Source } from "./source";
import { Store } from "./store";

function mount(element: HTMLElement, source: Source, usesAddress: boolean): () => void {
  element.classList.add("pycircuit");
  const store = new Store(source, element, usesAddress);
  renderInto(<App store={store} />, element);
  void store.start();
  return () => renderInto(null, element);
}

const page = document.getElementById("pycircuit-page");
if (page) {
  const data = document.getElementById("pycircuit-data");
  const source = data ? new EmbeddedSource(JSON.parse(data.textContent) as Embedded) : new ServerSource();
  page.classList.add("pycircuit-full");
  mount(page, source, true);
}

interface WidgetModel {
  get(name: string): unknown;
}

/** Draw a widget: anywidget calls this in a notebook. */
export default {
  render({ model, el }: { model: WidgetModel; el: HTMLElement }): () => void {
    const frame = document.createElement("div");
    frame.classList.add("pycircuit-widget");
    frame.tabIndex = -1; // a click anywhere in it gives it the keyboard
    frame.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own, such as A for a new cell
    frame.addEventListener("keydown", (event) => event.stopPropagation()); // those of other notebooks
    el.append(frame);
    return mount(frame, new EmbeddedSource(JSON.parse(model.get("data") as string) as Embedded), false);
  },
};
