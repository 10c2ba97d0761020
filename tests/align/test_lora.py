"""LoRA in the stages: what learns and what stays, what the next stage is given, and any layout."""

import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from megachat.config import ConfigError
from megachat.parallel.checkpoint import latest, load_model
from megachat.parallel.mesh import start
from megachat.train.loop import Task, loaded, train_step
from megachat.train.watch import Watch
from tests.align import tiny
from tests.spawn import on_ranks

LORA = ["lora=default", "lora.rank=4", "lora.alpha=8"]
SAMPLING = ["rollout=8", "epochs=1", "rollouts=9", "max_new_tokens=4", "at_once=8", "validation_prompts=2"]
STAGES = {
    "sft": ["epochs=9", "lora.dropout=0.1"],
    "rm": ["lora.dropout=0.1"],
    "dpo": [],
    "kto": [],
    "ppo": [*SAMPLING, "critic_first=0"],
    "grpo": [*SAMPLING, "group=4", "rewards=[model]"],
}
TRAINED = 4 * 2 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 128))
"""rank x layers x (inputs + outputs of queries and outputs, of keys and values, of the MLP's three)."""


def task(name: str, inputs: Path, run: Path, *overrides: str) -> Task:
    sizes = ["batch=8", "micro_batch=4", "resume=any", "max_steps=2"]
    return tiny.stage(name, inputs, run, *LORA, *sizes, *STAGES[name], *overrides)


def tensors(stage: Path) -> dict[str, Tensor]:
    """All that its newest checkpoint holds."""
    saved = latest(stage)
    files = [load_file(saved.path / name) for name in saved.manifest["files"]]
    return {name: value for file in files for name, value in file.items()}


@pytest.mark.parametrize("name", STAGES)
def test_the_small_matrices_learn_and_the_model_beside_them_stays(name: str, inputs: Path, run: Path) -> None:
    task(name, inputs, run).execute()
    before, after = tensors(inputs / "sft"), tensors(run / name)
    trunk, score = ("trunk.", 48 + 1) if name == "rm" else ("", 0)
    learnt = [key for key in after if key.startswith("model/exp_avg.")]
    assert {key.split(".")[-2] for key in learnt} == {"shrink", "expand"} | ({"score"} if score else set())
    assert sum(after[key].numel() for key in learnt) == TRAINED + score
    read = load_model(run / name).model
    for key, weight in before.items():
        name = trunk + key.removeprefix("model/weight.")
        layer = name.removesuffix(".weight")
        adapted = f"model/weight.{layer}.shrink.weight" in after
        assert torch.equal(after[f"model/weight.{layer}{'.base' * adapted}.weight"], weight), layer
        assert torch.equal(read.get_parameter(name), weight) == (not adapted), layer


def test_the_critic_learns_small_matrices_and_its_score(inputs: Path, run: Path) -> None:
    task("ppo", inputs, run).execute()
    after = tensors(run / "ppo")
    learnt = {key: value for key, value in after.items() if key.startswith("critic/exp_avg.")}
    assert {key.split(".")[-2] for key in learnt} == {"shrink", "expand", "score"}
    assert sum(value.numel() for value in learnt.values()) == TRAINED + 48 + 1
    layer = "weight.trunk.blocks.1.mlp.up"
    assert torch.equal(after[f"critic/{layer}.base.weight"], tensors(inputs / "rm")[f"model/{layer}.weight"])


def test_the_next_stage_starts_from_what_was_learnt_and_is_compared_with_it(inputs: Path, run: Path) -> None:
    task("sft", inputs, run).execute()
    folder = run.parent / "next"
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns("sft"))
    shutil.copytree(run / "sft", folder / "sft")
    dpo = task("dpo", folder, run)
    state = tiny.running(dpo)
    reference = state.frozen["reference"]
    learnt = load_model(run / "sft").model.state_dict()
    assert all(torch.equal(value, learnt[name]) for name, value in reference.state_dict().items())
    first, second = (
        {name: value / sums["weight"] for name, value in sums.items()}
        for sums in (train_step(dpo, state, batch, rate=3e-2) for batch in islice(dpo.batches(state), 2))
    )
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert abs(second["loss"] - math.log(2)) > 1e-4
    assert all(torch.equal(value, learnt[name]) for name, value in reference.state_dict().items())


def test_a_model_that_is_right_six_times_in_ten_learns_the_rest(
    half_right: Path, inputs: Path, run: Path
) -> None:
    folder = run.parent / "from"
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns("pretrain"))
    shutil.copytree(half_right / "sft", folder / "pretrain")
    settings = ["batch=16", "micro_batch=16", "epochs=60", "validation=0", "max_steps=40"]
    tiny.stage("sft", folder, run, *LORA, *settings, "optimizer.lr=1e-2").execute()
    losses = [row["loss"] for row in tiny.rows(run, "sft")]
    assert losses[0] > 0.3
    assert losses[-1] < 0.1
    assert '"ab? abab"' in (run / "sft" / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "layout"),
    [("sft", ["parallel=zero0"]), ("ppo", ["parallel=zero1", "parallel.precision=bf16"])],
)
def test_a_run_goes_on_to_the_last_bit_as_if_it_had_not_stopped(
    name: str, layout: list[str], inputs: Path, tmp_path: Path
) -> None:
    def trained(run: Path, *steps: int) -> list[dict[str, float]]:
        for step in steps:
            task(name, inputs, run, *layout, f"max_steps={step}").execute()
        return [{key: row[key] for key in ("loss", "gradient_norm")} for row in tiny.rows(run, name)]

    whole, stopped = trained(tmp_path / "whole", 4), trained(tmp_path / "stopped", 2, 4)
    assert len(whole) == 4
    assert stopped == whole
    one, other = (tensors(tmp_path / run / name) for run in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@on_ranks(2)
def test_what_is_read_computes_what_was_trained_at_every_zero_stage(inputs: Path, run: Path) -> None:
    tokens, before = torch.arange(24).view(2, 12), tensors(inputs / "sft")
    with torch.no_grad():
        base = load_model(inputs / "sft").model(tokens)
    for zero, precision in ((0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")):
        folder = run.parent / f"{zero}-{precision}"
        layout = [f"parallel=zero{zero}", f"parallel.precision={precision}"]
        sft = task("sft", inputs, folder, *layout, "optimizer.lr=3e-2", "preflight=false")
        sft.execute()
        state, _ = loaded(sft, start(1), Watch())
        plain = load_model(folder / "sft").model
        with torch.no_grad(), state.engines["model"].inference() as model:
            found = model(tokens).float()
        with torch.no_grad():
            read = plain(tokens)
        assert (read - base).abs().max() > 0.5
        assert_close(found, read, rtol=0.0, atol=1e-5 if precision == "fp32" else 0.05)
        # From ZeRO 1 on what is not trained is nowhere but in the precision that computes.
        rounded = precision == "bf16" and zero > 0
        for key, value in tensors(folder / "sft").items():
            if ".base." in key:
                weight = before[key.replace(".base.", ".")]
                assert torch.equal(value, weight.bfloat16().float() if rounded else weight), (zero, key)


def ends_at(layout: str, name: str, inputs: Path, run: Path, steps: int) -> None:
    settings = [*f"parallel={layout}".split(), "parallel.precision=fp32", f"max_steps={steps}"]
    settings += ["validation_interval=2", "lora.dropout=0"]  # what is dropped depends on the rank
    task(name, inputs, run, *settings).execute()


@on_ranks(1)
def alone(**where: Any) -> None:
    ends_at("zero0", **where)


@on_ranks(2)
def at_zero_3(**where: Any) -> None:
    ends_at("zero3", **where)


@on_ranks(2)
def in_two_halves(zero: int, **where: Any) -> None:
    ends_at(f"zero1_tp2 parallel.zero={zero}", **where)


@on_ranks(4)
def two_by_two(**where: Any) -> None:
    ends_at("zero2_tp2", **where)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), [("rm", 0), ("dpo", 3)])
def test_it_moves_from_zero_3_to_tensor_ranks_to_two_by_two(
    name: str, zero: int, inputs: Path, tmp_path: Path
) -> None:
    alone(name=name, inputs=inputs, run=tmp_path / "alone", steps=6)
    moved = {"name": name, "inputs": inputs, "run": tmp_path / "moved"}
    at_zero_3(**moved, steps=2)
    in_two_halves(**moved, steps=4, zero=zero)
    two_by_two(**moved, steps=6)
    expected, found = (tiny.rows(tmp_path / run, name) for run in ("alone", "moved"))
    assert [row["step"] for row in found] == [*range(1, 7)]
    for there, here in zip(expected, found, strict=True):
        compared = [key for key in there if key in ("loss", "gradient_norm") or key.startswith("validation/")]
        assert {key: here[key] for key in compared} == pytest.approx(
            {key: there[key] for key in compared}, rel=1e-4, abs=1e-6
        ), here["step"]
    one, other = (load_model(tmp_path / run / name).model for run in ("alone", "moved"))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert_close(other(tokens), one(tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", ["lora.dropout=0.1"], r"lora.dropout=0.1 is noise, which dpo would take for a difference"),
        ("sft", ["lora.modules=[attn.query]"], r"lora.modules.0: input should be 'attn.q', 'attn.k'"),
        ("rm", ["parallel.fp8=rowwise", "parallel.precision=bf16"], "parallel.fp8=rowwise has no use for"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: str, settings: list[str], message: str, inputs: Path, run: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        task(name, inputs, run, *settings)
