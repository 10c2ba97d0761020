"""`parts.py OUT FIRST COUNT megachat|bare ARGUMENT ...`: where the time of some steps goes.

Runs `megachat ARGUMENT ...`, or the loop of `bare.py`, with a clock around functions that are called once or
a few times a step; each second counts for the innermost of them that runs. After step FIRST + COUNT every
rank writes to `OUT/parts-RANK.json` what the COUNT steps before took. With BENCH_CLOCK=processor in the
environment seconds are those that its threads have worked.
"""

import functools
import importlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OTHER = "between steps"
"""What no function of the table is called for: data, log lines, looking at whether to stop."""

PARTS = {
    "forward": ["megachat.train.pretrain:Pretrain.loss", "megachat.model.gpt:GPT.forward"],
    "backward": ["torch.autograd:backward"],
    "collectives": [
        *(
            f"torch.distributed:{name}"
            for name in (
                "all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast",
                "reduce", "reduce_scatter", "reduce_scatter_tensor",
            )
        ),
        "deepspeed.runtime.zero.partition_parameters:AllGatherHandle.wait",
        "deepspeed.runtime.zero.partition_parameters:AllGatherCoalescedHandle.wait",
    ],
    "gradients": [
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer._update_hp_grad",
        "deepspeed.runtime.engine:DeepSpeedEngine.allreduce_gradients",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.process_gradients",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.get_flat_partition",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.reduce_ready_partitions_and_remove_grads",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue",
        "tools.bench.runners.bare:add_up",
    ],
    "weights": [
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.update_lp_params",
        "deepspeed.runtime.zero.stage_1_and_2:all_gather_dp_groups",
        "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator.fetch_sub_module",
        "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator.release_sub_module",
        "tools.bench.runners.bare:give_back",
    ],
    "norm, clip": [
        "deepspeed.runtime.bf16_optimizer:get_global_norm_of_tensors",
        "deepspeed.runtime.bf16_optimizer:clip_tensors_by_global_norm",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.check_overflow",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.unscale_and_clip_grads",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._overflow_check_and_loss_scale_update",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_norm_groups",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads",
        "megachat.parallel.engine:Engine._clip_by_hand",
        "torch.nn.utils:clip_grad_norm_",
    ],
    "optimizer": ["torch.optim:AdamW.step"],
    "clearing": [
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.clear_hp_grads",
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.clear_lp_grads",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.zero_grad",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.zero_grad",
        "torch.optim:Optimizer.zero_grad",
    ],
    "DeepSpeed": [
        "deepspeed.runtime.engine:DeepSpeedEngine.forward",
        "deepspeed.runtime.engine:DeepSpeedEngine.backward",
        "deepspeed.runtime.engine:DeepSpeedEngine.step",
    ],
    "loop": ["megachat.train.loop:train_step", "tools.bench.runners.bare:step"],
}  # fmt: skip
"""What is timed. Of `DeepSpeed`, `loop` and `forward` that is what the others leave."""


class Clock:
    """Seconds by part: each counts for the innermost one."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: Counter[str] = Counter()
        self.stack = [OTHER]
        self.since = now()
        self.thread = threading.get_ident()

    def restart(self) -> None:
        """Forgets what was counted."""
        self.seconds.clear()
        self.since = self.now()

    def lap(self) -> None:
        """Counts up to now."""
        now = self.now()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Counts for `part` meanwhile."""
        self.lap()
        self.stack.append(part)
        try:
            yield
        finally:
            self.lap()
            self.stack.pop()

    def around(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same function, counted in the thread that made this clock."""

        @functools.wraps(call)
        def timed(*given: Any, **named: Any) -> Any:
            if threading.get_ident() != self.thread:
                return call(*given, **named)
            with self.inside(part):
                return call(*given, **named)

        return timed


def wrap(path: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts something around the function `module:name` or the method `module:Class.name`."""
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for one in classes:
        owner = getattr(owner, one)
    setattr(owner, last, around(getattr(owner, last)))


def counting(clock: Clock, out: Path, first: int, count: int) -> Callable[..., Callable[..., Any]]:
    """Wraps the function that takes a step."""
    taken = 0

    def around(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def counted(*given: Any, **named: Any) -> Any:
            nonlocal taken
            if taken == first:
                clock.restart()
            elif (
                taken == first + count
            ):  # as the next one begins, so that what is between two counts as often
                clock.lap()
                told = {part: clock.seconds[part] / count for part in (*PARTS, OTHER)}
                path = out / f"parts-{os.environ.get('RANK', '0')}.json"
                path.write_text(json.dumps(told), encoding="utf-8")
            taken += 1
            return step(*given, **named)

        return counted

    return around


def main(arguments: Sequence[str]) -> None:
    """Runs it."""
    out, first, count, kind, *given = arguments
    clock = Clock(time.process_time if os.environ.get("BENCH_CLOCK") == "processor" else time.perf_counter)
    from megachat.__main__ import main as megachat  # first: it says how threads wait, before torch is loaded

    bare = kind == "bare"
    others = ("deepspeed", "megachat.train", "megachat.parallel") if bare else ("tools.",)
    for part, paths in PARTS.items():
        for path in paths:
            if not path.startswith(others):
                wrap(path, functools.partial(clock.around, part=part))
    step = "tools.bench.runners.bare:step" if bare else "megachat.train.loop:train_step"
    wrap(step, counting(clock, Path(out), int(first), int(count)))
    if bare:
        from tools.bench.job import Job
        from tools.bench.runners.bare import train

        train(Job.read(given[0]), given[1] == "autocast")
    else:
        megachat(given)


if __name__ == "__main__":
    main(sys.argv[1:])
