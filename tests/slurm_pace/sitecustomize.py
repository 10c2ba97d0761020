"""For ranks that Slurm starts: makes steps slow enough to be interrupted, notes them, breaks some.

Python imports a module of this name when it starts, wherever PYTHONPATH leads to it.
`PACE` is the seconds of a step, `PACE_LOG` a file of lines "time restart rank step". `FAULT` is a line of
Python that each rank runs when it starts, as step 0, and before every step, with `rank`, `node`, `step` and
`restart` at hand.
"""

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


class Slow(MetaPathFinder):
    """Puts itself between the loop and its step."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "megachat.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_slow(module: Any) -> None:
            run(module)
            module.train_step = slowly(module.train_step)

        spec.loader.exec_module = run_and_slow  # type: ignore[method-assign]
        return spec


def slowly(train_step: Any) -> Any:
    """The same step, later."""

    def step(task: Any, run: Any, *more: Any, **named: Any) -> Any:
        number = run.progress.step + 1
        fault(number)
        time.sleep(float(os.environ["PACE"]))
        result = train_step(task, run, *more, **named)
        with open(os.environ["PACE_LOG"], "a", encoding="utf-8") as file:
            file.write(f"{time.time()} {RESTART} {RANK} {number}\n")
        return result

    return step


def fault(step: int) -> None:
    """What the test wants to go wrong here."""
    facts = {"rank": RANK, "node": os.environ["SLURMD_NODENAME"], "step": step, "restart": RESTART}
    facts |= {"os": os, "time": time}
    exec(os.environ.get("FAULT", ""), facts)


if "PACE" in os.environ and "SLURM_STEP_ID" in os.environ and "megachat" in sys.orig_argv:
    RESTART, RANK = int(os.environ["SLURM_RESTART_COUNT"]), int(os.environ["SLURM_PROCID"])
    fault(0)
    sys.meta_path.insert(0, Slow())
