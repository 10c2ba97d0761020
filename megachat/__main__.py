"""`megachat <stage> [key=value ...]`: composes `conf/<stage>.yaml`, checks it, and runs it.

Heavy imports wait until a stage is known, so that `megachat --help` answers at once.
"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megachat.stages import CONF, did_you_mean, stages

USAGE = """usage: megachat STAGE [key=value ...]      any setting of the stage, as a Hydra override
       megachat STAGE --help               its settings, with their documentation
       megachat STAGE --cfg job            the config it would run with
       megachat STAGE -m key=1,2           one run for each value

stages"""

# libgomp's threads spin for milliseconds at the end of every parallel loop. Where they share their cores with
# anything else, each spins while the one it waits for is not running. Read once, when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 2 when the config has mistakes, 1 when the input has.

    And 70 when this node is unfit for training, 75 when a port is taken, 87 when training stood still.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = stages()
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        width = max(map(len, known))
        print(USAGE)
        print("\n".join(f"  {name:<{width}}  {line}" for name, line in known.items()))
        return
    if arguments[0] == "--version":
        from megachat import __version__

        print(__version__)
        return
    stage, *overrides = arguments
    if stage not in known:
        _fail(f"megachat has no stage {stage!r}; " + did_you_mean(stage, known, f"it has {', '.join(known)}"))
    from megachat.config import ConfigError

    try:
        if "--help" in overrides or "-h" in overrides:
            from megachat.config import describe

            print(describe(stage))
        elif any(override.startswith("-") for override in overrides):
            _through_hydra(stage, overrides)
        else:
            _run(stage, overrides)
    except ConfigError as mistakes:
        _fail(str(mistakes))


def _run(stage: str, overrides: Sequence[str]) -> None:
    from megachat.config import compose

    _execute(compose(stage, overrides), [stage, *overrides])


def _execute(tree: dict[str, Any], command: Sequence[str]) -> None:
    """Decodes the whole config before anything runs, then runs it here, or in one process per visible GPU."""
    from megachat.run import Stage, Superseded, perform, refuse

    stage = Stage.of(tree)
    try:
        if stage.trains and "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
            from megachat.parallel.mesh import expected_world, launch

            if (processes := expected_world()) > 1:
                sys.exit(launch(command, processes, stage.folder / "heartbeat.json"))
        elif not stage.trains and int(tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise ValueError(
                f"{stage.name} is one process, and srun started {tasks} that would write the same files; "
                "start it with `srun --ntasks=1`"
            )
        perform(stage)
    except KeyboardInterrupt:
        print(f"megachat {command[0]}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not isinstance(error, Superseded):
            refuse(stage, str(error))
        code = getattr(error, "exit_code", 1)  # what a launcher is to do: another node, another port
        if os.environ.get("MEGACHAT_TRACEBACK") and code == 1:
            raise
        if isinstance(error, OSError) and error.strerror:
            remedy = "; free some and run the same command again" if error.errno == errno.ENOSPC else ""
            error = ValueError(f"{error.filename or stage.run}: {error.strerror.lower()}{remedy}")
        print(f"megachat {command[0]}: {error}", file=sys.stderr)
        print("(MEGACHAT_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(code)


def _through_hydra(stage: str, overrides: Sequence[str]) -> None:
    """`--cfg`, `--multirun`, `--info`, and the rest of Hydra's own flags.

    Each job of a sweep writes to `<run>/<overrides>` and runs in a process of its own.
    """
    import subprocess

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from megachat.config import HYDRA_SETTINGS, compose, plain, quoted, rewrite

    # `--cfg job` has its argument as a word of its own.
    words = {"job", "hydra", "all", "defaults", "defaults-tree", "config", "plugins", "searchpath"}
    flags = [text for text in overrides if text.startswith("-") or text in words]
    settings = [text for text in overrides if text not in flags]
    sweep = any(flag in ("-m", "--multirun") for flag in flags)
    if "job" in flags:  # with the values that follow from others
        flags.append("--resolve")

    def job(config: Any) -> None:
        tree = plain(config)
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            _execute(tree, [stage, *settings])
            return
        texts = [text.lstrip("+") for text in HydraConfig.get().overrides.task]
        swept = [text for text in texts if text.partition("=")[0] in keys]
        folder = Path(tree["run"]) / ",".join(swept).replace("/", "-")
        command = [stage, *plain_settings, *swept, f"inputs={tree['inputs']}", f"run={folder}"]
        print(f"megachat {' '.join(command)}", file=sys.stderr)
        code = subprocess.run([sys.executable, "-m", "megachat", *command], check=False).returncode
        if code:
            sys.exit(code)

    # What is not swept over is passed to every job as it was written.
    keys = {text.lstrip("+").partition("=")[0] for text in settings if _is_sweep(text)}
    plain_settings = [text for text in settings if text.lstrip("+").partition("=")[0] not in keys]
    sweep_settings = []
    if sweep:  # Hydra writes down what was swept next to the runs
        run = compose(stage, plain_settings)["run"]
        sweep_settings = [f"hydra.sweep.dir={quoted(run)}", "hydra.sweep.subdir=."]
    sys.argv = ["megachat", *flags, *HYDRA_SETTINGS, *sweep_settings, *rewrite(stage, settings, sweep=sweep)]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=stage)(job)()


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except HydraException:
        return False


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
