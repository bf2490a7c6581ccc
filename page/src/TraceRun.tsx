/** A trace that runs: its progress, and its end. */

import { useEffect, useRef, useState } from "preact/hooks";
import { messageOf } from "./store";
import { useStore } from "./context";
import type { TraceEvent } from "./types";

export interface TraceRun {
  running: { id: string; event: TraceEvent } | null;
  failure: string | null;
  start: (submit: () => Promise<string>) => Promise<void>;
}

/** The run of one trace at a time. onGraph: called with the name of the graph, once the page lists it. */
export function useTraceRun(onGraph: (name: string) => Promise<void>): TraceRun {
  const store = useStore();
  const [running, setRunning] = useState<TraceRun["running"]>(null);
  const [failure, setFailure] = useState<string | null>(null);
  const stop = useRef<(() => void) | null>(null);
  useEffect(() => () => stop.current?.(), []);
  const onEvent = (id: string) => (event: TraceEvent) => {
    if (event.graph !== undefined) {
      const name = event.graph;
      setRunning(null);
      void store.refreshState().then(() => onGraph(name));
    } else if (event.error !== undefined || event.cancelled) {
      setRunning(null);
      if (event.cancelled) store.say("Cancelled");
      else setFailure(event.error!);
    } else setRunning({ id, event });
  };
  const start = async (submit: () => Promise<string>): Promise<void> => {
    setFailure(null);
    try {
      const id = await submit();
      setRunning({ id, event: { phase: "waiting" } });
      stop.current = store.source.watchTrace(id, onEvent(id));
    } catch (error) {
      setFailure(messageOf(error));
    }
  };
  return { running, failure, start };
}

/** The progress of a run with a button that cancels it, or else what is given, and what went wrong. */
export function RunOr({ run, children }: { run: TraceRun; children: preact.ComponentChildren }) {
  const store = useStore();
  const { running, failure } = run;
  return (
    <>
      {running ? (
        <Progress
          event={running.event}
          cancel={() => void store.source.cancelTrace(running.id).catch((error: unknown) => store.report(error))}
        />
      ) : (
        children
      )}
      {failure !== null && (
        <p class="problem" role="alert">
          {failure}
        </p>
      )}
    </>
  );
}

function Progress({ event, cancel }: { event: TraceEvent; cancel: () => void }) {
  const known = event.done !== undefined && event.total;
  return (
    <div class="progress" role="group" aria-label="Progress of the trace">
      <span>{event.phase ?? "tracing"}</span>
      <progress aria-label="Progress" max={1} value={known ? event.done! / event.total! : undefined} />
      <button type="button" class="small" onClick={cancel}>
        Cancel
      </button>
    </div>
  );
}
