"""Alarms of reward hacking: by hand, and of policies that learn to please a reward that can be pleased."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megachat.align.alarms import Alarms, Hacked
from megachat.align.rewards import Answer, Matches
from megachat.config import ConfigError, compose
from megachat.run import Stage
from megachat.train.loop import Running, Task, train_step
from tests.align import tiny

FINE = {"reward/mean": 1.0, "answer/length": 10.0, "answer/repetition": 0.1, "answer/stopped": 1.0}


def alarms(*overrides: str) -> Alarms:
    settings = ["prompts=json", "prompts.path=none", "rewards@alarms.judge=[regex]", "alarms.window=2"]
    made: Any = Stage.of(compose("grpo", [*settings, "alarms.judge.regex.pattern=a", *overrides]))
    found = made.alarms
    assert isinstance(found, Alarms)
    return found


def told(block: Alarms, *rows: dict[str, float], state: dict[str, Any] | None = None) -> list[float]:
    """How many alarms stand after each rollout."""
    state = {} if state is None else state
    return [block.watch("grpo", FINE | {"judge": 0.5} | row, state)["alarms"] for row in rows]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"answer/length": 20.1}, "20.1 tokens where they had 10"),
        ({"answer/length": 4.9}, "4.9 tokens where they had 10"),
        ({"answer/repetition": 0.31}, "31% of what an answer says"),
        ({"answer/stopped": 0.79}, "79% of the answers end by themselves"),
        ({"judge": 0.4}, "the judge gives them 0.4 where it gave 0.5"),
    ],
)
def test_what_goes_wrong_while_the_reward_rises_is_told(
    change: dict[str, float], word: str, capsys: pytest.CaptureFixture[str]
):
    worse = {"reward/mean": 2.0} | change
    assert told(alarms(), {}, {}, worse, worse) == [0, 0, 0, 1]
    said = capsys.readouterr().err
    assert "ALARM: grpo: the reward has risen from 1 to 2, but" in said
    assert word in said
    with pytest.raises(Hacked, match=r"or go on with alarms\.stop=false"):
        told(alarms("alarms.stop=true"), {}, {}, worse, worse)


@pytest.mark.parametrize(
    "change",
    [
        {"answer/length": 19.9},
        {"answer/length": 5.1},
        {"answer/repetition": 0.29},
        {"answer/stopped": 0.81},
        {"judge": 0.6},
    ],
)
def test_what_is_within_its_bounds_is_no_alarm(change: dict[str, float]):
    better = {"reward/mean": 2.0} | change
    assert told(alarms("alarms.stop=true"), {}, {}, better, better) == [0, 0, 0, 0]


def test_a_reward_that_has_not_risen_beyond_its_noise_is_no_alarm():
    long = {"answer/length": 99.0}
    block = alarms("alarms.stop=true")
    assert told(block, {}, {}, long, long) == [0, 0, 0, 0]
    # Means 1 and 1.5, each with variance 0.5 of two: a standard error of 0.71, and 0.5 is less than two.
    noisy = [{"reward/mean": value} for value in (0.5, 1.5)] + [long | {"reward/mean": v} for v in (1.0, 2.0)]
    assert told(block, *noisy) == [0, 0, 0, 0]
    with pytest.raises(Hacked):
        told(alarms("alarms.stop=true", "alarms.noise=0.7"), *noisy)


def test_an_alarm_is_said_once_and_stands_as_long_as_it_is_true(capsys: pytest.CaptureFixture[str]):
    worse, longer = (
        {"reward/mean": 2.0, "judge": 0.1},
        {"reward/mean": 2.0, "judge": 0.1, "answer/length": 99.0},
    )
    counts = told(alarms(), {}, {}, worse, worse, worse, longer, longer, {}, {})
    # At the end the reward is 1.5 in the mean, with a standard error of 0.5: no longer beyond noise.
    assert counts == [0, 0, 0, 1, 1, 2, 2, 0, 0]
    assert capsys.readouterr().err.count("ALARM") == 2


def test_a_run_that_goes_on_remembers_its_first_rollouts_and_other_settings_begin_anew():
    worse = {"reward/mean": 2.0, "judge": 0.1}
    state: dict[str, Any] = {}
    assert told(alarms(), {}, {}, worse, state=state) == [0, 0, 0]
    assert told(alarms(), worse, state=state) == [1]
    assert told(alarms("alarms.window=3"), worse, state=state) == [0]
    assert state["alarms"]["count"] == 1


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="window=1 says nothing about noise"):
        alarms("alarms.window=1")
    with pytest.raises(ConfigError, match=r"judge\.model is a reward model"):
        Stage.of(compose("ppo", ["prompts=json", "prompts.path=none", "rewards@alarms.judge=[model]"]))
    assert alarms("alarms.window=0").watch("grpo", FINE, {}) == {}


LONG = ["rewards=[length]", "rewards.length.shortest=12", "rewards.length.longest=20"]
HACK = ["group=8"]
HACK += ["rollout=64", "batch=64", "micro_batch=64", "at_once=64", "epochs=1", "max_new_tokens=12"]
HACK += ["rollouts=30", "alarms.window=4", "rewards@alarms.judge=[exact]", "alarms.judge.exact.after=''"]
HACK += ["prompts.held_out=0", "variant.kl=0"]


def learn(task: Task, rollouts: int) -> Running:
    """So many rollouts, each a step."""
    state = tiny.running(task)
    batches = task.batches(state)
    for _ in range(rollouts):
        train_step(task, state, next(batches), rate=2e-3)
        state.progress.step += 1
    return state


@pytest.mark.slow
def test_grpo_that_learns_to_please_a_length_is_stopped_and_one_that_learns_the_task_is_not(
    half_right: Path, run: Path
):
    # What is meant is `abab`; what is rewarded is length. The judge is told the truth in both.
    hacked = tiny.stage("grpo", half_right, run, *LONG, *HACK, "alarms.stop=true")
    with pytest.raises(Hacked, match=r"grpo: the reward has risen .* the judge gives them .* where it gave"):
        learn(hacked, 30)
    warned = tiny.stage("grpo", half_right, run, *LONG, *HACK)
    first, *more = learn(warned, 20).progress.state["alarms"]["told"]
    assert first == "judge"  # from the eighth rollout on, long before answers are twice as long
    assert "length" in more
    assert hacked.fingerprint() == warned.fingerprint()  # so that it can go on without the stop
    honest = tiny.stage("grpo", half_right, run, *HACK, "rewards=[exact]", "rewards.exact.after=''")
    state = learn(honest, 20)
    assert state.notes["judge"] == state.notes["reward/mean"] > 0.25
    assert state.progress.state["alarms"]["told"] == []


def test_ppo_watches_its_rollouts_and_a_judge_hears_every_answer(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    heard: list[Answer] = []
    own = Matches.scores

    def scores(self: Matches, answers: Sequence[Answer]) -> list[float]:
        heard.extend(answers)
        return own(self, answers)

    monkeypatch.setattr(Matches, "scores", scores)
    judge = ["rewards@alarms.judge=[regex]", "alarms.judge.regex.pattern=a", "alarms.judge.regex.weight=2"]
    task = tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, *judge)
    state = tiny.running(task)
    next(task.batches(state))
    assert len(heard) == 32
    assert state.notes["judge"] == pytest.approx(2 * sum("a" in one.text for one in heard) / 32)
    assert state.notes["alarms"] == 0
    kept = state.progress.state["alarms"]["first"][0]
    assert kept["answer/repetition"] == state.notes["answer/repetition"]
    assert kept["judge"] == state.notes["judge"]
