"""The stage: what it scores, what it leaves out, and numbers that are known beforehand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.config import compose, decode
from megachat.data.conversations import ask
from megachat.evals.evaluate import Evaluate
from megachat.files import write_json
from megachat.tokenizer.chat_format import render_prompt
from tests.evals import tiny

QUICK = [
    "questions=6",
    "pairs=12",
    "windows=4",
    "samples=2",
    "sampling.max_new_tokens=4",
    "log.wandb=disabled",
]
FUNCTIONS = [
    "prompts.modules=[math]",
    "prompts.functions=30",
    "preferences.modules=[math]",
    "preferences.functions=30",
]


def stage(run: Path, *overrides: str) -> Evaluate:
    about = FUNCTIONS if "prompts=json" not in overrides else FUNCTIONS[2:]
    built: Evaluate = decode(compose("evaluate", [f"run={run}", *QUICK, *about, *overrides]))
    return built


def evaluated(run: Path, *overrides: str) -> dict[str, Any]:
    stage(run, *overrides).execute()
    scores: dict[str, Any] = json.loads((run / "evaluate" / "scores.json").read_text())
    return scores


@pytest.fixture(autouse=True)
def _long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer spells most words letter by letter."""
    monkeypatch.setitem(tiny.SHAPE, "context", 200)


def test_nothing_to_evaluate_says_what_to_run(run: Path):
    with pytest.raises(ValueError, match=r"no model in .* has finished training.*megachat pipeline"):
        evaluated(run)


def test_a_base_model_alone_is_scored_and_the_rest_is_named(run: Path, capsys: pytest.CaptureFixture[str]):
    uniform = tiny.model()
    torch.nn.init.zeros_(uniform.embed.weight)
    tiny.write_model(run / "pretrain", uniform)
    tiny.write_shard(run / "encode")
    scores = evaluated(run)
    assert list(scores) == ["bits_per_byte"]
    # Each token costs log2(300) bits, whatever it is. A byte costs that over the bytes per token, which lies
    # between 1 (single letters) and the longest token.
    assert (
        math.log2(300) / tiny.tokenizer().token_bytes.max()
        < scores["bits_per_byte"]["value"]
        <= math.log2(300)
    )
    said = capsys.readouterr().err
    assert "recall is left out, `sft` has not finished" in said
    assert "rm_accuracy is left out, `rm` has not finished" in said
    assert "ppo is left out, there is no SFT model to compare it with" in said


def test_shards_of_another_tokenizer_are_not_scored(run: Path):
    tiny.write_model(run / "pretrain", tiny.model())
    tiny.write_shard(run / "encode")
    write_json(run / "encode" / "manifest.json", {"tokenizer": "0" * 64})
    with pytest.raises(ValueError, match=r"encode was encoded with tokenizer 0{12}, but this run's is"):
        evaluated(run)


def test_a_policy_that_is_sft_ties_with_it(run: Path):
    for name in ("sft", "ppo"):
        tiny.write_model(run / name, tiny.model(0))
    tiny.write_model(run / "rm", tiny.reward_model(1))
    scores = evaluated(run)
    assert {name: score["value"] for name, score in scores.items() if name.startswith("ppo")} == {
        "ppo_win_rate": 0.5,
        "ppo_win_rate_by_reward_model": 0.5,
        "ppo_reward_gain": 0.0,
        "ppo_kl": pytest.approx(0.0, abs=1e-5),
    }
    assert scores["recall_seen"] == scores["recall_unseen"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 6}
    assert not any(name.startswith("dpo") for name in scores)
    assert scores["rm_accuracy"]["n"] == sum(
        scores[f"rm_accuracy_{kind}"]["n"] for kind in ("other", "truncated", "spliced", "garbled")
    )


def test_samples_ask_every_model_the_same_and_hold_the_truth(run: Path):
    tiny.write_model(run / "pretrain", tiny.model(2))
    for name in ("sft", "dpo"):
        tiny.write_model(run / name, tiny.model(0))
    evaluated(run, "opening='def '")
    base, sft, dpo = json.loads((run / "evaluate" / "samples.json").read_text())
    assert (base["stage"], base["turns"][0]) == ("pretrain", {"role": "text", "text": "def "})
    assert [dialogue["stage"] for dialogue in (sft, dpo)] == ["sft", "dpo"]
    assert [turn["role"] for turn in sft["turns"]] == ["user", "assistant"] * 2
    assert sft["turns"] == dpo["turns"]
    assert sft["turns"][1]["truth"].endswith(".")


def test_a_model_that_knows_one_sentence_recalls_exactly_that(run: Path, monkeypatch: pytest.MonkeyPatch):
    """One answer is replaced by the truth: recall must be one in six, not more and not less."""
    tiny.write_model(run / "sft", tiny.model(0))
    settings = stage(run)
    asked = settings.prompts.unseen(settings.questions)
    known = render_prompt(asked[3].messages, tiny.tokenizer())
    truth = tiny.tokenizer().encode(asked[3].answer)

    def generate(model: Any, prompts: list[list[int]], *rest: Any, **named: Any) -> list[list[int]]:
        return [truth if prompt == known else [5] for prompt in prompts]

    monkeypatch.setattr("megachat.evals.answers.generate", generate)
    scores = evaluated(run)
    assert scores["recall_unseen"]["value"] == pytest.approx(1 / 6)
    assert scores["recall_seen"]["value"] == 0.0


def test_questions_are_never_asked_twice_and_come_in_new_words_when_functions_run_out(run: Path):
    prompts = stage(run).prompts
    seen, unseen = prompts.seen(100), prompts.unseen(100)
    assert (
        len(seen) == len({prompt.answer for prompt in seen}) < 30
    )  # each function once, the held-out ones not
    assert len(unseen) == len(set(unseen)) > len(seen)
    assert {prompt.answer for prompt in unseen} == {prompt.answer for prompt in seen}
    assert not set(seen) & set(unseen)


def test_questions_too_long_for_the_model_are_left_out_and_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(tiny.SHAPE, "context", 24)
    tiny.write_model(run / "sft", tiny.model(0))
    prompts = Path(run.parent, "prompts.jsonl")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text('{"prompt": "Hi", "answer": "Yes."}\n{"prompt": "' + "long " * 40 + '"}\n')
    scores = evaluated(
        run, "prompts=json", f"prompts.path={prompts}", "prompts.held_out=0.999", "policies=[]"
    )
    assert scores["recall_unseen"]["n"] == 1
    assert "1 of 2 questions are longer than 20 tokens, left out" in capsys.readouterr().err


def test_a_policy_without_a_question_to_answer_is_named_and_left_out(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("sft", "dpo"):
        tiny.write_model(run / name, tiny.model(0))
    tiny.write_shard(run / "encode")
    prompts = Path(run.parent, "prompts.jsonl")
    prompts.write_text('{"prompt": "Hi"}\n')
    scores = evaluated(run, "prompts=json", f"prompts.path={prompts}", "prompts.held_out=0", "context=16")
    assert set(scores) == {"bits_per_byte_sft"}
    assert "dpo is left out, there is no question" in capsys.readouterr().err


def test_a_model_in_a_batch_says_what_it_says_alone(run: Path):
    tiny.write_model(run / "sft", tiny.model(0))
    prompts = [ask("What does math.gcd do?"), ask("?")]
    settings = stage(run, "batch=1")
    loaded = settings.load("sft", "recall")
    assert loaded is not None
    assert len(render_prompt(prompts[0], loaded.tokenizer)) > len(render_prompt(prompts[1], loaded.tokenizer))
    questions = settings.prompts.unseen(settings.questions)
    alone = settings.answers(loaded, questions, settings.greedy, "alone")
    together = stage(run, "batch=6").answers(loaded, questions, settings.greedy, "together")
    assert alone == together


def test_a_stage_that_finishes_later_makes_it_run_again(run: Path):
    tiny.write_model(run / "sft", tiny.model(0))
    evaluate = Evaluate.of(compose("evaluate", [f"run={run}"]))
    before = evaluate.fingerprint()
    assert evaluate.reads() == ["sft"]
    tiny.write_model(run / "dpo", tiny.model(0))
    assert evaluate.reads() == ["sft", "dpo"]
    assert evaluate.fingerprint() != before
