"""How fast the devices of this machine sum a tensor. `python -m megachat.parallel.link` is one rank of it."""

import socket
import subprocess
import sys
from contextlib import ExitStack

from megachat.parallel.mesh import environment_of, free_port, start
from megachat.parallel.preflight import Findings, check_sum


def measure(ranks: int, patience: float) -> tuple[float, str]:
    """GB/s of an all-reduce over so many processes of this machine; and what is wrong, "" for nothing."""
    port = free_port()
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "megachat.parallel.link"],
                    env=environment_of(rank, ranks, port),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(ranks)
        ]
        try:
            told = [process.communicate(timeout=patience) for process in processes]
        except subprocess.TimeoutExpired:
            return 0.0, f"no answer in {patience:g} s"
        finally:
            for process in processes:
                process.kill()
    for process, (_, said) in zip(processes, told, strict=True):
        if process.returncode:
            return 0.0, (said.strip().splitlines() or ["ended without a word"])[-1]
    return float(told[0][0].split()[-1]), ""


def main() -> None:
    """One rank of it: prints the speed, or ends with what is wrong."""
    mesh = start(1, patience=30.0)
    found = Findings(socket.gethostname())
    speed = check_sum(mesh, found)
    if found.unfit:
        sys.exit(found.unfit)
    print(speed)


if __name__ == "__main__":
    main()
