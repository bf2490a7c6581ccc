import { createContext } from "preact";
import { useContext } from "preact/hooks";
import type { Store } from "./store";

export const StoreContext = createContext<Store | null>(null);

/** The store of the page that a component is on. */
export function useStore(): Store {
  const store = useContext(StoreContext);
  if (!store) throw new Error("useStore: the component must be inside a page");
  return store;
}
