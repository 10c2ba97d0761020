"""Fault 21: W&B does not answer, or not any more. No step waits for it, and the run ends."""

import json
import socket
import statistics
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.ranks import Attempt, Job, Story, weights
from tests.spawn import free_port

pytestmark = pytest.mark.faults

SETTINGS = ("tokens=6144",)
RUN = {"id": "1", "name": "run", "config": "{}", "project": {"name": "project", "entity": {"name": "me"}}}
ANSWER = json.dumps({"data": {"upsertBucket": {"bucket": RUN, "inserted": True}}}).encode()
"""Whatever W&B asks when a run begins, it is content with this."""


class Server(ThreadingHTTPServer):
    """Enough of W&B's to begin a run, until it is `gone`."""

    daemon_threads = True
    block_on_close = False
    gone = ""
    """`hangs`: it takes what it is sent and says no more; `resets`: it hangs up on whoever calls."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.over = threading.Event()
        self.missed = 0
        """Requests that it did not answer."""


class Answering(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Queries and figures alike."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.gone:
            self.server.missed += 1
            self.close_connection = True
        if self.server.gone == "hangs":
            self.server.over.wait()
        elif self.server.gone == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(ANSWER)))
            self.end_headers()
            self.wfile.write(ANSWER)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def server() -> Iterator[Server]:
    """On a port of its own."""
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.over.set()
        made.shutdown()
        thread.join()


def reaching(port: int) -> dict[str, str]:
    """The variables of a run that looks for W&B there."""
    return {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_INIT_TIMEOUT": "6",
        "WANDB_FINISH_TIMEOUT": "6",
        "WANDB_MODE": "online",
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2",  # seconds, in place of 15: runs are short here
    }


def step_seconds(story: Story) -> float:
    """The median time between two steps."""
    times = [line["time"] for line in story.of("step", rank=0)]
    return statistics.median(after - before for before, after in pairwise(times))


def goes_on(job: Job, reference: Job) -> None:
    """The one attempt finished as if W&B were there, soon, and no step waited."""
    (attempt,) = job.story.attempts
    same = attempt.codes == [0, 0] and weights(job.run) == weights(reference.run)
    assert same, attempt.said
    assert attempt.ended - job.story.of("begin")[0]["time"] < 60, "it waited for W&B"
    # 0.2 s: a single request to a server takes that; a step here takes some 0.03 s.
    assert step_seconds(job.story) < step_seconds(reference.story) + 0.2


@pytest.mark.parametrize("how", ["refuses", "hangs", "resets"])
def test_a_run_that_cannot_reach_wandb_is_recorded_offline_and_no_step_waits(
    how: str, server: Server, start: Start, straight: Straight
) -> None:
    server.gone = how
    port = free_port() if how == "refuses" else server.server_port
    job = start(*SETTINGS, "log.wandb=online", variables=reaching(port))
    (attempt,) = job.go().attempts
    goes_on(job, straight(*SETTINGS))
    assert "W&B cannot be reached" in attempt.printed()
    assert len(list((job.run / "wandb").glob("offline-run-*"))) == 1
    record("21 W&B down", survived=True, lost=0)


@pytest.mark.parametrize("how", ["hangs", "resets"])
def test_a_run_goes_on_when_wandb_goes_away_and_no_step_waits(
    how: str, server: Server, start: Start, straight: Straight
) -> None:
    def leave(attempt: Attempt) -> None:
        assert attempt.reached(6)
        server.gone = how

    job = start(*SETTINGS, "log.wandb=online", variables=reaching(server.server_port))
    attempt = job.attempt(watch=leave)
    goes_on(job, straight(*SETTINGS))
    assert server.missed
    assert "W&B cannot be reached" not in attempt.printed()
    assert [path.name[:4] for path in (job.run / "wandb").glob("*run-*/*.wandb")] == ["run-"]
    record("21 W&B goes away", survived=True, lost=0)
