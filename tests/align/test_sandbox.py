"""Programs that models write: what they print comes back, and what runs wild is ended."""

import time

import pytest

from megachat.align.sandbox import Limits, side_by_side

LIMITS = Limits(seconds=10.0, megabytes=256)
SHORT = Limits(seconds=1.0, megabytes=256)


def test_a_program_that_comes_to_its_end_is_told_with_what_it_printed():
    outcome = LIMITS.run("print('three', 1 + 2)\nprint('数')")
    assert outcome.output == "three 3\n数\n"
    assert outcome.ended


@pytest.mark.parametrize(
    "program",
    ["assert 1 == 2", "def f(:", "import sys; sys.exit(0)", "import os; os._exit(0)", "print('x'); 1 / 0"],
)
def test_one_that_fails_or_leaves_before_its_end_has_not_come_to_it(program: str):
    assert not LIMITS.run(program).ended


def test_its_error_can_be_read():
    assert "ZeroDivisionError" in LIMITS.run("1 / 0").output


def test_one_that_does_not_end_is_killed_in_time_with_what_it_has_started():
    begun = time.monotonic()
    child = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
    assert not SHORT.run(f"{child}time.sleep(60)").ended
    assert time.monotonic() - begun < 8


def test_memory_is_limited():
    assert LIMITS.run("x = bytearray(50 * 2**20)").ended
    outcome = LIMITS.run("x = bytearray(500 * 2**20)")
    assert not outcome.ended
    assert "MemoryError" in outcome.output


def test_it_sees_neither_our_environment_nor_our_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    outcome = LIMITS.run("import os\nprint('OPENAI_API_KEY' in os.environ, os.listdir('.'))")
    assert outcome.output == "False []\n"


def test_endless_output_is_cut():
    outcome = LIMITS.run("print('x' * 2_000_000)")
    assert len(outcome.output) <= 100_000


def test_side_by_side_keeps_the_order():
    assert side_by_side(lambda x: x * x, [3, 1, 2], at_once=2) == [9, 1, 4]
