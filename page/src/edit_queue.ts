/** Edits on their way to the server, in order, with a reload when someone else was first. */

import type { Signal } from "@preact/signals";
import { EMPTY_DOCUMENT, type Source } from "./source";
import type { EditDocument, Edits } from "./types";

export class EditQueue {
  private last: Promise<void> = Promise.resolve();

  constructor(
    private readonly source: Source,
    private readonly edits: Signal<Edits | null>,
    private readonly report: (error: unknown) => void,
  ) {}

  /** Load the edits of a graph. embedded: edits from the address of a page without a server. */
  async load(name: string, embedded: string | null): Promise<void> {
    try {
      const edits = await this.source.edits(name);
      this.edits.value = edits;
      if (embedded !== null && !this.source.live) {
        const document = JSON.parse(embedded) as Partial<EditDocument>;
        this.edits.value = await this.source.putEdits(name, edits.revision, { ...EMPTY_DOCUMENT, ...document });
      }
    } catch (error) {
      this.report(error);
    }
  }

  change(name: string, edit: (document: EditDocument) => void): void {
    const edits = this.edits.peek();
    if (!edits) return;
    const document = structuredClone(edits.document);
    edit(document);
    this.edits.value = { ...edits, document, can_undo: true, can_redo: false };
    this.enqueue(name, () => this.source.putEdits(name, this.edits.peek()?.revision ?? 0, document));
  }

  step(name: string, direction: "undo" | "redo"): void {
    this.enqueue(name, () => this.source[direction](name, this.edits.peek()?.revision ?? 0));
  }

  /** The edits as JSON for the address; null where there are none. */
  embedded(): string | null {
    const document = this.edits.value?.document;
    if (!document) return null;
    const text = JSON.stringify(document);
    return text === JSON.stringify(EMPTY_DOCUMENT) ? null : text;
  }

  private enqueue(name: string, send: () => Promise<Edits>): void {
    let waiting = true;
    this.last = this.last.then(async () => {
      try {
        const reply = await send();
        waiting = false;
        this.merge(reply);
      } catch (error) {
        this.report(error);
        if (waiting) await this.load(name, null);
      }
    });
    this.pending += 1;
    void this.last.finally(() => (this.pending -= 1));
  }

  private pending = 0;

  /** Adopt a reply; while newer edits wait, only its revision. */
  private merge(reply: Edits): void {
    const edits = this.edits.peek();
    this.edits.value = this.pending > 1 && edits ? { ...edits, revision: reply.revision } : reply;
  }
}
