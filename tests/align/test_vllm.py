"""vLLM writes the answers: what it is asked, what it gives, and that it is the policy which it gives."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.align import vllm
from megachat.align.answers import rendered
from megachat.align.grpo import GRPO
from megachat.align.ppo import PPO
from megachat.align.rollout import as_rows, disagreement
from megachat.align.rows import padded
from megachat.config import ConfigError, decode
from megachat.model.blueprint import Blueprint
from megachat.model.lora import LoRA, adapted, merged, summed
from megachat.train.loop import Running, train_step
from tests.align import tiny
from tests.spawn import on_ranks
from tests.tiny_model import shape

ENVIRONMENT = Path(__file__).parents[2] / ".venv-bench" / "vllm" / "bin" / "python"
VLLM = ["engine=vllm", f"engine.python={ENVIRONMENT}", "engine.eager=true", "engine.cpu_gib=1"]
AHEAD = ["engine.ahead=true", "importance_cap=2"]
SHAPE = shape(dim=64, layers=2, heads=2, kv_heads=1, hidden=128, context=256)
"""vLLM's attention on a CPU knows heads of 32 numbers and more."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SHAPE", SHAPE)
        yield tiny.make(tmp_path_factory.mktemp("inputs") / "run")


SHORT = ["group=4", "rewards=[length]", "rewards.length.shortest=1", "rewards.length.longest=2"]
"""What any answer can be better or worse at."""


def made(inputs: Path, run: Path, *overrides: str) -> GRPO:
    task = tiny.stage("grpo", inputs, run, *tiny.ROLLOUTS, *SHORT, *overrides)
    assert isinstance(task, GRPO)
    return task


def test_an_interpreter_that_is_not_there_is_named_with_the_remedy(inputs: Path, run: Path):
    task = made(inputs, run, "engine=vllm", "engine.python=nowhere/bin/python")
    with pytest.raises(
        ValueError, match=r"engine\.python=nowhere/bin/python does not exist; .*setup\.sh vllm"
    ):
        task.execute()


def test_an_environment_without_vllm_is_told(inputs: Path, run: Path):
    task = made(inputs, run, "engine=vllm", f"engine.python={sys.executable}")
    with pytest.raises(
        ValueError, match=r"vLLM: ModuleNotFoundError: No module named .vllm.; see .*vllm\.log"
    ):
        task.execute()


def test_a_server_that_dies_is_told_with_its_last_words(inputs: Path, run: Path, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nread line\necho no memory left >&2\nexit 3\n")
    python.chmod(0o755)
    task = made(inputs, run, "engine=vllm", f"engine.python={python}")
    with pytest.raises(ValueError, match=r"(?s)vLLM has ended with status 3; .*no memory left"):
        task.execute()


@pytest.mark.parametrize(
    ("overrides", "most"),
    [([], "1.01"), (["engine.dtype=bfloat16"], "1.05"), (["engine.most_error=1.2"], "1.2")],
)
def test_probabilities_of_other_weights_end_the_run(inputs: Path, run: Path, overrides: list[str], most: str):
    task = made(inputs, run, "engine=vllm", *overrides)
    state = tiny.running(task)
    assert task.engine is not None
    task.engine.check(float(most) - 0.001, state)
    for error in (float(most) + 0.001, float("nan")):
        with pytest.raises(ValueError, match=rf"engine\.most_error={most}: .*factor of {error:.4g} "):
            task.engine.check(error, state)
    with pytest.raises(ConfigError, match=r"most_error"):
        made(inputs, run, "engine=vllm", "engine.most_error=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.ahead=true"], r"one rollout old, which importance_cap=null .* set importance_cap=2"),
        ([*AHEAD, "environment=calculator"], r"engine\.ahead=true cannot know .* environment=none"),
    ],
)
def test_writing_ahead_is_refused_where_it_cannot_be_right(
    inputs: Path, run: Path, overrides: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        made(inputs, run, "engine=vllm", *overrides)


def test_an_adapted_models_weights_one_by_one_are_those_of_the_merged_model():
    torch.manual_seed(0)
    model = decode(SHAPE).build(280)
    weights = {f"weight.{name}": value.detach().clone() for name, value in model.named_parameters()}
    lora = LoRA(rank=2, alpha=6.0, dropout=0.0, modules=["attn.q", "mlp.down"])
    start = adapted(Blueprint(model, lambda name, *index: weights[name][index]), lora)
    own = {f"weight.{name}": torch.randn(value.shape) for name, value in start.model.named_parameters()}
    plain = dict(summed(own.items(), lora))
    assert plain.keys() == weights.keys()
    expected = merged(lambda name, *index: own[name][index], lora)
    for name in weights:
        assert torch.equal(plain[name], expected(name)), name


@pytest.mark.vllm
@pytest.mark.parametrize("lora", [[], ["lora=default"]])
def test_its_probabilities_are_the_trainers_before_and_after_an_update(
    inputs: Path, run: Path, lora: list[str]
):
    task = made(inputs, run, *VLLM, *lora, "temperature=0.7")
    state = tiny.running(task)
    batches: Any = task.batches(state)
    errors = []
    for _ in range(3 * task.steps):
        batch = next(batches)
        errors.append(state.notes["sampler/error"])
        train_step(task, state, batch, rate=1e-2)
        state.progress.step += 1
    assert max(errors) < 1 + 1e-5
    assert state.notes["kl"] > 0.1  # the policy has moved from where it was
    # Weights that vLLM has not heard of: as far from the policy as it has moved in a rollout.
    state.data.server.holds = state.progress.step
    with pytest.raises(ValueError, match=r"engine\.most_error=1\.01"):
        next(batches)
    state.data.server.close()


@pytest.mark.vllm
def test_a_rollout_written_ahead_is_of_the_weights_of_a_rollout_ago(inputs: Path, run: Path):
    task = made(inputs, run, *VLLM, *AHEAD, "rollouts=4")
    state = tiny.running(task)
    batches: Any = task.batches(state)
    errors = []
    for step in range(state.total):
        batch = next(batches)
        if step % task.steps == 0:
            errors.append(state.notes["sampler/error"])
            assert (state.data.server.ahead is not None) == (step + task.steps < state.total)
        train_step(task, state, batch, rate=1e-2)
        state.progress.step += 1
    state.data.server.close()
    assert state.notes["sampler/probe"] < 1 + 1e-5
    assert errors[0] < 1 + 1e-5  # nothing could be written before it
    assert min(errors[2:]) > 1.01  # the policy has moved on since
    assert state.notes["kl/k3"] > 0.05


@pytest.mark.vllm
def test_answers_written_ahead_of_other_weights_end_the_run(
    inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    task = made(inputs, run, *VLLM, *AHEAD)
    state = tiny.running(task)
    batches: Any = task.batches(state)
    next(batches)
    with torch.no_grad():
        for weight in state.engines["model"].module.parameters():
            weight.mul_(1.5)  # which vLLM has been sent as they were
    with pytest.raises(ValueError, match=r"engine\.most_error=1\.01"):
        task.ahead(lambda: (state.data.train[:4], [*range(4)]), state)
    state.data.server.close()


@pytest.mark.vllm
def test_what_it_has_computed_of_a_prompt_is_forgotten_with_the_weights(
    inputs: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def error() -> float:
        task = made(inputs, run, *VLLM)
        state = tiny.running(task)
        question = state.data.train[0]
        long = replace(question, tokens=(question.tokens * 50)[:200])
        with state.engines["model"].inference():
            task.written([long] * 4, range(4), state)
        for parameter in state.engines["model"].module.parameters():
            parameter.data.mul_(1.1)
        state.progress.step += 1
        answers = task.written([long] * 4, range(4), state)
        rows = padded([rendered(long.tokens, one) for one in answers], state.tokenizer.pad)
        with state.engines["model"].inference():
            logps = task.logps(state.engines["model"], rows)
        state.data.server.close()
        return disagreement(logps, as_rows((one.logps for one in answers), rows), rows.mask)["sampler/error"]

    assert error() < 1 + 1e-5
    forgetful = tmp_path / "server.py"
    text = vllm.SCRIPT.read_text(encoding="utf-8")
    assert "if not self.model.reset_prefix_cache():" in text
    forgetful.write_text(text.replace("if not self.model.reset_prefix_cache():", "if False:"))
    monkeypatch.setattr(vllm, "SCRIPT", forgetful)
    assert error() > 1.01


@pytest.mark.vllm
def test_an_answer_follows_from_its_seed(inputs: Path, run: Path):
    task = made(inputs, run, *VLLM)
    state = tiny.running(task)
    questions = state.data.train[:6]
    first, again = (task.answers(questions, range(6), state) for _ in range(2))
    other = task.answers(questions, range(6, 12), state)
    state.data.server.close()
    assert [one.tokens for one in first] == [one.tokens for one in again]
    assert [one.tokens for one in first] != [one.tokens for one in other]
    assert all(len(one.tokens) == len(one.logps) <= task.max_new_tokens for one in first)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_stage_runs_to_its_end(name: str, inputs: Path, run: Path):
    groups = SHORT if name == "grpo" else ["critic_first=0"]
    task = tiny.stage(name, inputs, run, *tiny.ROLLOUTS, *groups, *VLLM, "rollouts=2", "validation_prompts=2")
    assert isinstance(task, GRPO | PPO)
    task.execute()
    rows = tiny.rows(run, name)
    assert len(rows) == 2 * task.steps
    assert all(row["sampler/error"] < 1 + 1e-5 for row in rows if "sampler/error" in row)


@pytest.mark.vllm
@on_ranks(2)
def test_two_ranks_have_one_server_and_the_same_answers(inputs: Path, run: Path) -> None:
    task = made(inputs, run, *VLLM, "parallel=zero3")
    state: Running = tiny.running(task)
    (answer, *_) = task.answers(state.data.train[:4], range(4), state)
    assert len(set(state.mesh.gather(str(answer.tokens)))) == 1
    batches: Any = task.batches(state)
    for _ in range(2 * task.steps + 1):
        train_step(task, state, next(batches), rate=1e-2)
        state.progress.step += 1
    assert state.notes["sampler/error"] < 1 + 1e-5
    assert state.notes["kl"] > 0.01
    state.data.server.close()
