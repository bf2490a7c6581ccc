"""Run the Python of a page of the documents as its reader would, in the page's folder: figures are written there.

`python scripts/run_page.py docs/recipes/refusal.md` prints what the page's code prints, and the processor's seconds.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        page = page.resolve()
        os.chdir(page.parent)
        begin = time.process_time()
        names: dict[str, object] = {"__name__": "__main__"}
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        print(f"{page.name}: {time.process_time() - begin:.1f} s of processor time")


if __name__ == "__main__":
    main()
