"""What a command takes: time, and the most memory that it and all it starts held at once.

    python tools/bench/measure.py megachat clean corpus=files corpus.path=runs/text

Memory that processes share is counted once (Linux's proportional set size, looked at five times a second);
pages of files that are mapped count as well.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path


def held(session: int) -> int:
    """Bytes that the processes of a session hold together."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (process / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session:
                pss = (process / "smaps_rollup").read_text().split("\nPss:")[1].split()[0]
                total += 1024 * int(pss)
        except (OSError, IndexError):  # it has just ended
            continue
    return total


def main() -> int:
    """Runs the command, and says what it took."""
    if len(sys.argv) < 2:
        sys.exit("usage: python tools/bench/measure.py COMMAND [ARGUMENT ...]")
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(sys.argv[1:], start_new_session=True)
    while process.poll() is None:
        peak = max(peak, held(process.pid))
        time.sleep(0.2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, busy = time.monotonic() - started, used.ru_utime + used.ru_stime
    print(f"{wall:.1f} s, {busy:.1f} s of processor time, {peak / 1e9:.2f} GB of memory at the most")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
