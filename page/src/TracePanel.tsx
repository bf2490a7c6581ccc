/** A new graph: prompt, targets, position, the estimate before, and the progress during the trace. */

import { useEffect, useState } from "preact/hooks";
import { RunOr, useTraceRun } from "./TraceRun";
import { messageOf } from "./store";
import { useStore } from "./context";
import type { Estimate, TraceRequest } from "./types";

export function TracePanel() {
  const store = useStore();
  const [fields, setFields] = useState<FieldValues>({ prompt: "", targets: "", position: "-1", most: "" });
  const run = useTraceRun((name) => store.open(name).then(() => store.show("node")));
  const request = requestOf(fields);
  return (
    <form
      class="stack"
      data-testid="trace"
      onSubmit={(event) => {
        event.preventDefault();
        void run.start(() => store.source.trace(request));
      }}
    >
      <Fields fields={fields} edit={(part) => setFields({ ...fields, ...part })} />
      <EstimateLine request={request} />
      <RunOr run={run}>
        <button class="primary" type="submit" disabled={fields.prompt.trim() === ""}>
          Trace
        </button>
      </RunOr>
    </form>
  );
}

/** Targets as people type them: tokens between commas, "Austin vs Sacramento" for a contrast, | within a side. */
export function targetsOf(text: string): TraceRequest["targets"] {
  const words = text
    .split(",")
    .map((word) => word.trim())
    .filter((word) => word !== "");
  if (words.length === 0) return null;
  const side = (part: string): string[] => part.split("|").map((token) => token.trim());
  return words.map((word) => {
    const [tokens, against] = word.split(/\s+vs\.?\s+/);
    return tokens && against ? { tokens: side(tokens), against: side(against) } : word;
  });
}

interface FieldValues {
  prompt: string;
  targets: string;
  position: string;
  most: string;
}

function requestOf({ prompt, targets, position, most }: FieldValues): TraceRequest {
  return {
    prompt,
    targets: targetsOf(targets),
    position: Number(position),
    max_features: most.trim() === "" ? null : Number(most),
  };
}

function Fields({ fields, edit }: { fields: FieldValues; edit: (part: Partial<FieldValues>) => void }) {
  return (
    <>
      <label class="field">
        Prompt
        <textarea rows={4} value={fields.prompt} onInput={(event) => edit({ prompt: event.currentTarget.value })} />
      </label>
      <label class="field">
        Targets
        <input
          placeholder="the likeliest tokens; or Austin; or Austin vs Sacramento"
          value={fields.targets}
          onInput={(event) => edit({ targets: event.currentTarget.value })}
        />
      </label>
      <div class="form">
        <label>
          Position
          <input
            type="number"
            value={fields.position}
            onInput={(event) => edit({ position: event.currentTarget.value })}
          />
        </label>
        <label>
          Most features
          <input
            type="number"
            min={1}
            placeholder="default"
            value={fields.most}
            onInput={(event) => edit({ most: event.currentTarget.value })}
          />
        </label>
      </div>
    </>
  );
}

function EstimateLine({ request }: { request: TraceRequest }) {
  const store = useStore();
  const [estimate, setEstimate] = useState<Estimate | null>(null);
  const [failure, setFailure] = useState<string | null>(null);
  const key = JSON.stringify(request);
  useEffect(() => {
    let open = true;
    const wanted = JSON.parse(key) as TraceRequest;
    const timer = window.setTimeout(() => {
      if (wanted.prompt.trim() === "") {
        setEstimate(null);
        return;
      }
      store.source
        .estimate(wanted)
        .then((answer) => {
          if (!open) return;
          setEstimate(answer);
          setFailure(null);
        })
        .catch((error: unknown) => open && setFailure(messageOf(error)));
    }, 350);
    return () => {
      open = false;
      window.clearTimeout(timer);
    };
  }, [store, key]);
  if (failure !== null) return <p class="hint">{failure}</p>;
  return (
    <p class="hint" data-testid="estimate">
      {estimate ? estimate.text : "The estimate of memory and time appears here."}
    </p>
  );
}
