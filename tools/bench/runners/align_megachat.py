"""`align_megachat.py grpo|dpo LESSON.json RESULT.json`: megachat's own stage, as one rank."""

import os
import sys
from pathlib import Path

from megachat.config import compose
from megachat.log import rows
from megachat.parallel.mesh import environment_of, free_port
from megachat.run import Stage, perform
from tools.bench.lesson import Lesson


def settings(stage: str, lesson: Lesson, run: Path) -> list[str]:
    """What is typed behind `megachat grpo` or `megachat dpo`."""
    common = [
        f"run={run}", f"inputs={lesson.run}", "start=pretrain", f"context={lesson.model['context']}",
        f"batch={lesson.batch}", f"micro_batch={lesson.micro_batch}", f"optimizer.lr={lesson.lr}",
        f"parallel.precision={'fp32' if lesson.precision == 'float32' else 'bf16'}",
        f"max_steps={lesson.steps + 1}", "checkpoint_interval=0", "validation_interval=0", "log.interval=1",
        "log.wandb=disabled", "preflight=false",
    ]  # fmt: skip
    own = {
        "grpo": [
            "prompts=json", f"prompts.path={lesson.texts}", "prompts.held_out=0", "rewards=[regex]",
            "rewards.regex.pattern=e", f"group={lesson.group}", f"rollout={lesson.batch}",
            f"rollouts={lesson.steps + 1}", f"at_once={lesson.batch}", f"max_new_tokens={lesson.new}",
            f"variant.kl={lesson.beta}", "validation_prompts=0",
        ],
        "dpo": [
            "preferences=json", f"preferences.path={lesson.texts}", "preferences.held_out=0",
            f"loss.beta={lesson.beta}", "epochs=1000", "schedule=constant",
        ],
    }  # fmt: skip
    return [*common, *own[stage]]


def main() -> None:
    """Trains."""
    stage, lesson = sys.argv[1], Lesson.read(sys.argv[2])
    os.environ.update(environment_of(0, 1, free_port()))
    run = Path(sys.argv[3]).parent / "run"
    perform(Stage.of(compose(stage, settings(stage, lesson, run))))
    told = [*rows(run / stage / "metrics.jsonl")]
    lesson.taken([row["seconds"] for row in told], [row["loss"] for row in told], sys.argv[3])


if __name__ == "__main__":
    main()
