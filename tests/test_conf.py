"""Every file under conf/: it decodes, it is complete, it is reachable, and nothing of it is repeated in Python."""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import megachat
from megachat.config import CONF, Config, ConfigError, compose, decode, stages
from megachat.run import Stage

STAGES = sorted(stages())
EXPERIMENTS = sorted(path.name for path in (CONF / "experiment").iterdir() if path.is_dir())


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
        return {key for name, value in items for key in left_open(value, f"{path}.{name}" if path else str(name))}
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


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_stage_decodes_in_an_experiment(stage: str, experiment: str) -> None:
    decoded = decode(compose(stage, [f"experiment={experiment}"]))
    assert decoded.run == Path("runs") / experiment


@pytest.mark.parametrize(("stage", "group"), [(stage, group) for stage in STAGES for group in groups(stage)])
def test_a_stage_decodes_with_any_choice_of_block(stage: str, group: str) -> None:
    for option in options(group):
        tree = compose(stage, [f"{group}={option}"])
        try:
            decode(tree)
        except ConfigError as error:
            asked = {f"  {key}: missing" for key in left_open(tree)}
            assert asked, f"{group}={option}: {error}"
            assert set(str(error).splitlines()[1:]) == asked, f"{group}={option}"


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
                wrong.append(f"{cls.__name__}.{name} has no docstring, which `megachat <stage> --help` would show")
    assert wrong == []
