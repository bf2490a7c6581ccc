/** Edits of a page without a server, with undo and redo. */

import type { EditDocument, Edits } from "./types";

const LONGEST = 500;

export class History {
  private readonly past: EditDocument[] = [];
  private future: EditDocument[] = [];
  private revision = 0;

  constructor(private present: EditDocument) {}

  edits(): Edits {
    return {
      revision: this.revision,
      document: this.present,
      can_undo: this.past.length > 0,
      can_redo: this.future.length > 0,
    };
  }

  add(document: EditDocument): Edits {
    if (JSON.stringify(document) !== JSON.stringify(this.present)) {
      this.past.push(this.present);
      if (this.past.length > LONGEST) this.past.shift();
      this.future = [];
      this.present = document;
      this.revision += 1;
    }
    return this.edits();
  }

  undo(): Edits {
    const before = this.past.pop();
    if (before) {
      this.future.push(this.present);
      this.present = before;
      this.revision += 1;
    }
    return this.edits();
  }

  redo(): Edits {
    const next = this.future.pop();
    if (next) {
      this.past.push(this.present);
      this.present = next;
      this.revision += 1;
    }
    return this.edits();
  }
}
