"""The single-GPU smoke test.

Every training stage in bf16 on CUDA, against the CPU's fp32 losses, and save, resume, generate.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import TINY, environment, make

pytestmark = pytest.mark.gpu

ALIGN = {
    "sft": ["context=128", "batch=16", "micro_batch=8", "epochs=50"],
    "rm": ["context=128", "batch=16", "micro_batch=8", "epochs=50"],
    "dpo": ["context=128", "batch=16", "micro_batch=8", "epochs=50"],
    "ppo": [
        "context=128", "rollouts=10", "rollout=16", "batch=8", "micro_batch=8", "epochs=1", "at_once=16",
        "max_new_tokens=16", "critic_first=0", "validation_prompts=4",
    ],
}  # fmt: skip
SMALL = [*TINY, "context=128", "model.context=128"]
"""The settings of `pretrain`; the last one of a name counts."""
FUNCTIONS = {"conversations": ["sft"], "preferences": ["rm", "dpo"], "prompts": ["ppo"]}


def megachat(stage: str, run: Path, device: str, *overrides: str) -> None:
    variables = {
        key: value
        for key, value in environment().items()
        if key not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
    }
    if device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    else:
        variables |= {"CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-m", "megachat", stage, f"run={run}", "log.wandb=disabled", *overrides]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(run: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def chain(run: Path, device: str) -> None:
    """Pretraining, SFT, RM, DPO and PPO of a tiny model: 20 optimizer steps each, then greedy generation."""
    precision = "parallel.precision=bf16" if device == "cuda" else "parallel.precision=fp32"
    megachat(
        "pretrain",
        run,
        device,
        "model=gpt_3m",
        *SMALL,
        "tokens=20480",
        precision,
    )
    for stage, settings in ALIGN.items():
        data = [f"{group}.functions=40" for group, stages in FUNCTIONS.items() if stage in stages]
        size = [] if stage == "ppo" else ["max_steps=20"]
        megachat(
            stage, run, device, "log.interval=1", precision, "validation_interval=0", *data, *settings, *size
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = make(tmp_path_factory.mktemp("gpu") / "runs" / "cuda")
    twin = source.parent / "cpu"
    subprocess.run(["cp", "-r", str(source), str(twin)], check=True)
    chain(source, "cuda")
    chain(twin, "cpu")
    return source, twin


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo"])
def test_twenty_bf16_steps_follow_the_cpus_fp32_losses(both: tuple[Path, Path], stage: str) -> None:
    cuda, cpu = (losses(run, stage) for run in both)
    assert len(cuda) == len(cpu) == 20
    assert cuda == pytest.approx(cpu, rel=0.05, abs=0.03)


def test_ppo_takes_its_steps_with_finite_losses(both: tuple[Path, Path]) -> None:
    cuda, _ = (losses(run, "ppo") for run in both)
    assert len(cuda) == 20
    assert all(abs(loss) < 10 for loss in cuda)


def test_a_chat_model_answers_on_the_gpu(both: tuple[Path, Path]) -> None:
    from megachat.model.generate import Sampling, generate
    from megachat.parallel.checkpoint import load_model

    loaded = load_model(both[0] / "sft", device="cuda")
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=8)
    prompts = [[loaded.tokenizer.bos, loaded.tokenizer.user], [loaded.tokenizer.bos]]
    answers = generate(loaded.model, prompts, greedy, {loaded.tokenizer.end})
    assert all(1 <= len(answer) <= 8 for answer in answers)


def test_a_run_saved_on_the_gpu_goes_on_there_from_its_checkpoint(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    run, source = tmp_path / "resumed", both[0]
    common = ["model=gpt_3m", *SMALL, "parallel.precision=bf16", f"inputs={source}"]
    megachat("pretrain", run, "cuda", *common, "tokens=10240", "schedule=constant")
    megachat("pretrain", run, "cuda", *common, "tokens=20480", "schedule=constant", "resume=any")
    straight = tmp_path / "straight"
    megachat("pretrain", straight, "cuda", *common, "tokens=20480", "schedule=constant")
    # The warm-up is a share of all steps, so the two differ in the first;
    # later steps agree within bf16's noise.
    assert losses(run, "pretrain")[-1] == pytest.approx(losses(straight, "pretrain")[-1], rel=0.1)


def test_a_row_draws_the_same_token_on_the_gpu_as_on_the_cpu() -> None:
    import torch

    from megachat.model.draws import draw, keys

    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0))
    here = draw(logits.softmax(-1), keys(range(500), 3))
    there = draw(logits.cuda().softmax(-1), keys(range(500), 3, "cuda")).cpu()
    assert (here != there).sum() <= 1  # but for rounding
