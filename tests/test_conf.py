"""Every file under conf/ decodes, is complete, can be reached, and is the only home of its values."""

import importlib
import itertools
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import megachat
from megachat.config import Config, ConfigError, compose, decode
from megachat.run import Stage
from megachat.stages import CONF, stages

STAGES = sorted(stages())
EXPERIMENTS = sorted(
    {(path.parent.name, path.stem) for path in (CONF / "experiment").rglob("*.yaml")}
    | {("quickstart", stage) for stage in STAGES}  # of a stage that it has no file for it only names the run
)


@pytest.fixture(autouse=True)
def eight_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism is checked against the size of the job."""
    monkeypatch.setenv("WORLD_SIZE", "8")


def groups(stage: str) -> list[str]:
    """The groups that a stage chooses from: the keys of its `defaults`."""
    defaults = yaml.safe_load((CONF / f"{stage}.yaml").read_text(encoding="utf-8"))["defaults"]
    return [key for entry in defaults if isinstance(entry, dict) for key in entry]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def left_open(node: Any, path: str = "") -> set[str]:
    """The dotted keys of values that a YAML leaves to the user: `path: ???`."""
    if isinstance(node, dict):
        items = node.items()
        return {
            key for name, value in items for key in left_open(value, f"{path}.{name}" if path else str(name))
        }
    return {path} if node == "???" else set()


def blocks() -> list[type[Config]]:
    """Every class of settings in megachat."""
    for module in pkgutil.walk_packages(megachat.__path__, "megachat."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: list[type[Config]] = []
    todo = [Config]
    while todo:
        subclasses = todo.pop().__subclasses__()
        todo += subclasses
        found += [cls for cls in subclasses if cls.__module__.startswith("megachat.")]
    return sorted(set(found), key=lambda cls: (cls.__module__, cls.__qualname__))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_decodes_to_the_class_of_its_name(stage: str) -> None:
    decoded = Stage.of(compose(stage))
    assert decoded.name == stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_says_in_one_line_what_it_does(stage: str) -> None:
    first = (CONF / f"{stage}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    assert re.fullmatch(r"# \S.{10,100}", first), f"conf/{stage}.yaml begins with {first!r}"


@pytest.mark.parametrize(("experiment", "stage"), EXPERIMENTS)
def test_a_stage_decodes_in_an_experiment(experiment: str, stage: str) -> None:
    decoded = decode(compose(stage, [f"experiment={experiment}"]))
    assert decoded.run == Path("runs") / experiment


def choices() -> list[list[str]]:
    """Commands that between them choose every option once, and few: Hydra takes 0.2 s to compose one."""
    commands, covered = [], {"log"}
    for stage in STAGES:
        new = {group: options(group) for group in groups(stage) if group not in covered}
        covered |= set(new)
        for row in itertools.zip_longest(*new.values()):
            chosen = [f"{group}={option}" for group, option in zip(new, row, strict=True) if option]
            commands.append([stage, *chosen])
    return commands


@pytest.mark.parametrize("command", choices(), ids=" ".join)
def test_a_stage_decodes_with_every_choice_of_block(command: list[str]) -> None:
    tree = compose(command[0], command[1:])
    asked = left_open(tree)
    if not asked:
        decode(tree)
        return
    with pytest.raises(ConfigError) as missing:
        decode(tree)
    assert set(str(missing.value).splitlines()[1:]) == {f"  {key}: missing" for key in asked}


def test_every_block_can_be_chosen_by_some_stage() -> None:
    chosen = {group for stage in STAGES for group in groups(stage)}
    there = {path.name for path in CONF.iterdir() if path.is_dir()} - {"experiment"}
    assert there - chosen == set()


def test_an_experiment_overrides_stages_that_exist() -> None:
    overridden = {path.stem for path in (CONF / "experiment").rglob("*.yaml")}
    assert overridden - set(STAGES) == set()


@pytest.mark.parametrize("path", sorted((CONF / "experiment").rglob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_is_merged_into_the_stage_itself(path: Path) -> None:
    # Without this first line its settings would land under a key `experiment`.
    assert path.read_text(encoding="utf-8").startswith("# @package _global_\n")


def test_every_setting_is_documented_and_has_its_value_in_conf() -> None:
    wrong = []
    for cls in blocks():
        if not cls.__doc__:
            wrong.append(f"{cls.__name__} has no docstring")
        for name, field in cls.model_fields.items():
            if not field.is_required():
                wrong.append(f"{cls.__name__}.{name}: its default belongs into conf/")
            if not field.description:
                wrong.append(
                    f"{cls.__name__}.{name} has no docstring, which `megachat <stage> --help` would show"
                )
    assert wrong == []
