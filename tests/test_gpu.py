"""The single-GPU smoke test.

Every training stage in bf16 on CUDA, against the CPU's fp32 losses, and generation; and in fp32 a checkpoint
goes on wherever it was saved.
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
EXACT = [
    "model=gpt_3m", *SMALL, "tokens=20480", "parallel.precision=fp32", "optimizer.lr=1e-3",
    "schedule=constant", "schedule.warmup=0",
]  # fmt: skip
"""`pretrain` so that devices agree, and that does not depend on how many steps there will be."""
FUNCTIONS = {"conversations": ["sft"], "preferences": ["rm", "dpo"], "prompts": ["ppo"]}


def megachat(stage: str, run: Path, device: str, *overrides: str) -> str:
    """Runs a stage in a process of its own; what it says."""
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
    return done.stderr


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


@pytest.fixture(scope="module")
def straight(both: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of eight steps in fp32 on the CPU."""
    run = tmp_path_factory.mktemp("straight") / "run"
    megachat("pretrain", run, "cpu", *EXACT, f"inputs={both[1]}", "max_steps=8")
    return losses(run, "pretrain")


@pytest.mark.parametrize(("saved", "loaded"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_checkpoint_of_one_device_goes_on_on_another_with_the_same_losses(
    both: tuple[Path, Path], straight: list[float], tmp_path: Path, saved: str, loaded: str
) -> None:
    run, common = tmp_path / "run", [*EXACT, f"inputs={both[1]}"]
    metrics = run / "pretrain" / "metrics.jsonl"
    megachat("pretrain", run, saved, *common, "max_steps=4")
    earlier = metrics.read_text()
    assert len(earlier.splitlines()) == 4
    said = megachat("pretrain", run, loaded, *common, "max_steps=8", "resume=any")
    assert "goes on from step 4" in said
    assert metrics.read_text().startswith(
        earlier
    )  # with the times of the first four steps: none is taken twice
    assert len(straight) == 8
    assert losses(run, "pretrain") == pytest.approx(straight, rel=1e-4)


def test_a_row_draws_the_same_token_on_the_gpu_as_on_the_cpu() -> None:
    import torch

    from megachat.model.draws import draw, keys

    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0))
    here = draw(logits.softmax(-1), keys(range(500), 3))
    there = draw(logits.cuda().softmax(-1), keys(range(500), 3, "cuda")).cpu()
    assert (here != there).sum() <= 1  # but for rounding
