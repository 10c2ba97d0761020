"""Where alignment starts, and that judges stay what they were."""

from pathlib import Path

import pytest
import torch

from megachat.align.start import frozen, without_dropout
from tests.align import tiny


def test_a_judge_has_no_gradients_and_is_in_eval_mode(inputs: Path, run: Path):
    state = tiny.running(tiny.stage("dpo", inputs, run))
    judge = state.frozen["reference"]
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert state.engines["model"].module.training


def test_a_judge_computes_in_the_precision_of_the_model_in_training(inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run)
    state = tiny.running(task)
    state.engines["model"].module.bfloat16()
    judge = frozen(task.models(state)["model"], state)
    assert {parameter.dtype for parameter in judge.parameters()} == {torch.bfloat16}


def test_dropout_is_switched_off_in_every_block(inputs: Path, run: Path):
    model = tiny.stage("dpo", inputs, run).models(tiny.running(tiny.stage("sft", inputs, run)))["model"].model
    for block in model.blocks:
        block.dropout = 0.1
    without_dropout(model)
    assert [block.dropout for block in model.blocks] == [0.0, 0.0]


def test_the_reference_of_a_run_that_goes_on_is_the_model_it_started_from(inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run)
    state = tiny.running(task)
    with torch.no_grad():
        for parameter in state.engines["model"].module.parameters():
            parameter.add_(1.0)  # the policy has been trained
    task.prepare(state)
    fresh = tiny.running(task).frozen["reference"].state_dict()
    assert all(
        torch.equal(value, fresh[name]) for name, value in state.frozen["reference"].state_dict().items()
    )


def test_a_stage_that_has_not_run_is_named(inputs: Path, run: Path):
    with pytest.raises(ValueError, match="which has not finished"):
        tiny.running(tiny.stage("dpo", inputs, run, "start=ppo"))
