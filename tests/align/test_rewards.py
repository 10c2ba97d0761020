"""What answers are worth, by hand; the judge is a server of our own on this machine."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from typing import Any

import pytest
from torch import tensor

from megachat.align.rewards import (
    Answer,
    Exact,
    Judge,
    Length,
    Matches,
    UnitTests,
    code_of,
    correct,
    number_of,
    pass_at,
    passes,
)
from megachat.align.sandbox import Limits
from megachat.config import ConfigError, compose, decode
from megachat.data.conversations import Prompt, ask


def answer(text: str, truth: str = "", tokens: int = 5) -> Answer:
    return Answer(Prompt(ask("How many?"), truth), text, tokens, stopped=True)


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        ("Half is 24.\n#### 72", "72", 1),
        ("Half is 24.\n#### 72", "He has 48+24 = 72.\n#### 72", 1),  # the whole solution as the truth
        ("#### 1,000.00", "1000", 1),
        ("#### $72.", "72", 1),
        ("So it is 72 apples.", "72", 1),  # no mark: the last number
        ("72 or 73", "72", 0),
        ("#### 73\nbut 72", "72", 0),
        ("#### -5", "5", 0),
        ("", "5", 0),
        ("#### 1/2", "0.5", 1),
        ("Paris", "paris", 1),
        ("It is Paris", "Paris", 0),  # no number: all of the answer
        ("I think\n#### Paris", "Paris", 1),
        ("The log to base 10.", "Return 10.", 0),  # the truth is a sentence, not the number in it
    ],
)
def test_the_true_result_is_told_whatever_it_is_written_like(text: str, truth: str, score: float):
    assert Exact(weight=1.0, after="####", strict=False).scores([answer(text, truth)]) == [score]


def test_a_strict_result_stands_behind_the_mark():
    strict = Exact(weight=1.0, after="####", strict=True)
    assert strict.scores([answer("72", "72"), answer("#### 72", "72")]) == [0, 1]


@pytest.mark.parametrize(
    ("text", "number"),
    [("$1,250.50.", 2501 / 2), ("-3", -3), ("5%", 5), ("a", None), ("1/0", None), ("", None)],
)
def test_numbers_are_read(text: str, number: float | None):
    assert number_of(text) == number


def test_patterns_match_somewhere_or_the_whole_answer():
    answers = [answer("<think>a\nb</think> yes"), answer("no <think></think>")]
    pattern = "<think>.*</think>.+"
    assert Matches(weight=1.0, pattern=pattern, whole=True).scores(answers) == [1, 0]
    assert Matches(weight=1.0, pattern="<think>", whole=False).scores(answers) == [1, 1]


def test_a_broken_pattern_is_named():
    with pytest.raises(ConfigError, match=r"rewards.regex.pattern: '\(' is no regular expression"):
        decode(compose("grpo", ["rewards=regex", "rewards.regex.pattern='('", "prompts=python"]))


def test_lengths_fall_off_on_both_sides():
    length = Length(weight=1.0, shortest=10, longest=100)
    scores = length.scores([answer("", tokens=count) for count in (1, 5, 10, 100, 150, 200, 900)])
    assert scores == pytest.approx([-0.9, -0.5, 0, 0, -0.5, -1, -1])


def test_code_is_the_last_block_or_everything():
    assert code_of("Try\n```python\na = 1\n```\nno,\n```\na = 2\n```") == "a = 2\n"
    assert code_of("a = 3") == "a = 3"
    assert code_of("```python\ncut = off") == "cut = off"


def test_unit_tests_pass_or_fail_and_cannot_be_left_early():
    tests = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
    said = [
        "```python\ndef add(a, b):\n    return a + b\n```",
        "def add(a, b):\n    return a - b",
        "import sys\nsys.exit(0)",
        "def add(a, b):\n    while True: pass",
    ]
    reward = UnitTests(weight=1.0, limits=Limits(seconds=3.0, megabytes=256), at_once=2)
    assert reward.scores([answer(text, tests) for text in said]) == [1, 0, 0, 0]


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible one that scores an answer by its number of letters, and is busy at first."""

    asked: list[dict[str, Any]]
    keys: list[str | None]
    busy: int
    code: int

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        kind.asked.append(body)
        kind.keys.append(self.headers["Authorization"])
        if len(kind.asked) <= kind.busy:
            self.send_error(kind.code)
            return
        said = f"Fine. Score: {len(body['messages'][0]['content'].split('ANSWER ')[1])}"
        reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@contextmanager
def endpoint(busy: int = 0, code: int = 429) -> Iterator[tuple[str, type[Endpoint]]]:
    kind = type("One", (Endpoint,), {"asked": [], "keys": [], "busy": busy, "code": code})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", kind
        finally:
            server.shutdown()
            thread.join()


def judge(url: str, **changes: Any) -> Judge:
    settings = {
        "weight": 1.0, "url": url, "model": "wise", "key": "JUDGE_KEY", "tries": 3, "at_once": 2,
        "instruction": "{prompt} TRUTH {truth} ANSWER {answer}", "pattern": r"Score:\s*([0-9.]+)",
        "highest": 10.0, "timeout": 10.0,
    }  # fmt: skip
    return Judge(**(settings | changes))


def test_a_judge_scores_in_order_with_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with endpoint() as (url, seen):
        scores = judge(url).scores([answer("abc", "3"), answer("{truth}", "3"), answer("x" * 30)])
    assert scores == [0.3, 0.7, 1.0]  # what an answer says is no place to fill in; 30 of 10 is 1
    assert set(seen.keys) == {"Bearer sesame"}
    assert {one["model"] for one in seen.asked} == {"wise"}


def test_a_busy_judge_is_asked_again():
    with endpoint(busy=1) as (url, seen):
        assert judge(url, key=None).scores([answer("ab")]) == [0.2]
    assert seen.keys == [None, None]


@pytest.mark.parametrize(("code", "tries"), [(503, 2), (401, 1)])
def test_a_judge_that_does_not_score_ends_the_stage_and_the_key_is_not_told(
    code: int, tries: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with (
        endpoint(busy=9, code=code) as (url, seen),
        pytest.raises(ValueError, match="gave no score") as failed,
    ):
        judge(url, tries=2).scores([answer("ab")])
    assert f"the judge wise at {url} gave no score in {tries} of 2 tries: it answers {code}" in str(
        failed.value
    )
    assert "sesame" not in str(failed.value)
    assert len(seen.asked) == tries


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment has no JUDGE_KEY; export it, or set key=null"):
        judge("http://127.0.0.1:9/v1").scores([answer("ab")])


def test_words_instead_of_a_score_are_shown():
    with (
        endpoint() as (url, _),
        pytest.raises(ValueError, match=r"there is no '\[A-Z\]\{9\}' in 'Fine. Score: 2'"),
    ):
        judge(url, key=None, tries=1, pattern="[A-Z]{9}").scores([answer("ab")])


@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(right: int):
    answers = [place < right for place in range(6)]
    for k in range(1, 7):
        chosen = [any(some) for some in combinations(answers, k)]
        assert pass_at(k, samples=6, right=right) == pytest.approx(sum(chosen) / len(chosen))


def test_pass_at_k_is_told_at_powers_of_two_and_at_all():
    right = tensor([[True, False, False], [False, False, False]])
    assert passes(right) == pytest.approx({"pass@1": 1 / 6, "pass@2": 1 / 3, "pass@3": 1 / 2})


def test_an_answer_is_right_to_those_rewards_that_know_the_truth():
    rewards = {
        "exact": Exact(weight=1.0, after="", strict=False),
        "length": Length(weight=1.0, shortest=1, longest=2),
        "again": Exact(weight=-1.0, after="", strict=True),
    }
    by_reward = tensor([[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    assert correct(rewards, by_reward).tolist() == [True, False, False]
