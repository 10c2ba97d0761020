"""Where the ranks of a job meet: the address and port of rank 0, which every rank is told."""

import itertools
import socket

FIRST, COUNT = 20000, 12000
"""Below 32768, where Linux begins to hand out ports to whoever asks."""


def address(nodes: list[str]) -> str:
    """Rank 0 runs on the first node of the job; a job on one node needs no name that resolves."""
    return nodes[0] if len(nodes) > 1 else "127.0.0.1"


def port(job: int, restarts: int) -> int:
    """One that this node can listen on.

    It follows from the job, for two jobs may share a node, and from the attempt, for ranks of the one before
    may still hold theirs. A port may be taken on an address where it answers nobody: so it is tried.
    """
    for offset in itertools.count():
        number = FIRST + (job + 101 * restarts + offset) % COUNT
        try:
            socket.create_server(("", number)).close()
        except OSError:
            if offset == COUNT:
                raise
            continue
        return number
    raise AssertionError("unreachable")
