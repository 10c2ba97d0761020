"""Where ranks meet."""

import socket
from contextlib import suppress

from megachat.slurm import meet


def test_a_job_on_one_node_needs_no_name() -> None:
    assert meet.address(["node1"]) == "127.0.0.1"
    assert meet.address(["node1", "node2"]) == "node1"


def test_the_port_follows_from_the_job_and_the_attempt_below_those_that_linux_hands_out() -> None:
    with suppress(OSError):  # unless somebody has one of them just now
        assert meet.port(7, 0) in range(20007, 20050)
        assert meet.port(7, 1) in range(20108, 20150)
    assert 20000 <= meet.port(11999, 300) < 32768


def test_a_port_that_is_taken_on_any_address_is_passed_over() -> None:
    free = meet.port(4711, 0)
    with socket.create_server(("127.0.0.3", free)):
        assert meet.port(4711, 0) > free
