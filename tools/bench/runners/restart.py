"""`restart.py MARKS.json STAGE [SETTING ...]`: runs a stage as `megachat` does, and notes when it was where.

Rank 0 writes the marks when it has taken its first step after a checkpoint, as seconds since 1970.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

marks: dict[str, float] = {}


def main() -> None:
    """Runs it."""
    path, stage, *settings = sys.argv[1:]
    import megachat.train.loop as loop
    from megachat.__main__ import main as megachat
    from megachat.parallel import checkpoint

    marks["started"] = time.time()
    newest, restore, step = checkpoint.newest, loop.restore, loop.train_step

    def timed_newest(*given: Any) -> Any:
        marks["verify"] = time.time()
        found = newest(*given)
        marks["verified"] = time.time()
        return found

    def timed_restore(*given: Any) -> Any:
        progress = restore(*given)
        marks.setdefault("restored", time.time())
        return progress

    def timed_step(*given: Any) -> Any:
        sums = step(*given)
        if "restored" in marks and "stepped" not in marks:
            marks["stepped"] = time.time()
            if os.environ["RANK"] == "0":
                temporary = Path(path).with_suffix(".tmp")
                temporary.write_text(json.dumps(marks), encoding="utf-8")
                temporary.rename(path)
        return sums

    checkpoint.newest, loop.restore, loop.train_step = timed_newest, timed_restore, timed_step
    megachat([stage, *settings])


if __name__ == "__main__":
    main()
