"""Every message of the config door, word for word, on a package and a `conf/` made for the purpose."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator

from megachat import config
from megachat import stages as listing
from megachat.config import Config, ConfigError, compose, decode, rewrite
from megachat.stages import stages


class Optimizer(Config, ABC):
    """Abstract: a config names AdamW."""

    @abstractmethod
    def build(self) -> None:
        """Nothing to build here."""


class AdamW(Optimizer):
    """An optimizer."""

    lr: PositiveFloat
    betas: tuple[float, float]

    def build(self) -> None:
        return None


class Model(Config):
    """A model whose settings depend on each other."""

    dim: PositiveInt
    heads: PositiveInt
    kind: Literal["gpt", "moe"]

    @model_validator(mode="after")
    def heads_divide_dim(self) -> "Model":
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        return self


class Train(Config):
    """A stage."""

    run: Path
    prompt: str
    model: Model
    optimizer: Optimizer
    steps: PositiveInt

    @field_validator("prompt")
    @classmethod
    def not_rude(cls, prompt: str) -> str:
        if "rude" in prompt:
            raise ValueError("be polite")
        return prompt


FILES = {
    "train.yaml": """# Train something
        _target_: megachat.sample.Train
        defaults: [model: small, optimizer: adamw, _self_]
        run: runs/main
        prompt: hello
        steps: 10""",
    "chat.yaml": """# Talk to it
        _target_: megachat.sample.Train""",
    "model/small.yaml": "{_target_: megachat.sample.Model, dim: 64, heads: 4, kind: gpt}",
    "model/large.yaml": "{_target_: megachat.sample.Model, dim: 512, heads: 8, kind: gpt}",
    "optimizer/adamw.yaml": "{_target_: megachat.sample.AdamW, lr: 1e-3, betas: [0.9, 0.95]}",
    "optimizer/wrong.yaml": "{_target_: megachat.sample.Model, dim: 64, heads: 4, kind: gpt}",
    "experiment/tiny/train.yaml": """# @package _global_
        defaults: [override /model: large]
        steps: 3""",
    "experiment/other/chat.yaml": "# @package _global_",
}


@pytest.fixture(autouse=True)
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `conf/` of two stages, and the module their `_target_`s name."""
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()) + "\n")
    for reader in (config, listing):
        monkeypatch.setattr(reader, "CONF", tmp_path / "conf")
    module = ModuleType("megachat.sample")
    for item in (Optimizer, AdamW, Model, Train):
        setattr(module, item.__name__, item)
    module.helper = len  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megachat.sample", module)
    return tmp_path / "conf"


def told(
    *overrides: str, stage: str = "train", edit: Callable[[dict[str, Any]], None] = lambda tree: None
) -> str:
    """What the user reads after these overrides."""
    with pytest.raises(ConfigError) as caught:  # noqa: PT012
        tree = compose(stage, overrides)
        edit(tree)
        decode(tree)
    return str(caught.value)


def test_a_config_becomes_the_objects_it_names() -> None:
    train = decode(compose("train"))
    assert isinstance(train, Train)
    assert train.model == Model(dim=64, heads=4, kind="gpt")
    assert train.optimizer == AdamW(lr=1e-3, betas=(0.9, 0.95))
    assert train.run == Path("runs/main")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        decode(compose("train")).steps = 5


def test_stages_are_the_files_with_their_first_comment() -> None:
    assert stages() == {"train": "Train something", "chat": "Talk to it"}


def test_several_mistakes_are_listed_at_once() -> None:
    assert told(
        "stepz=3", "model.dim=-1", "model.kind=gtp", "optimizer.lr=abc", "optimizer.momentum=0.9"
    ) == (
        "5 mistakes in the config\n"
        "  model.dim: input should be greater than 0, got -1\n"
        "  model.kind: input should be 'gpt' or 'moe', got 'gtp'\n"
        "  optimizer.lr: input should be a valid number, unable to parse string as a number, got 'abc'\n"
        "  optimizer.momentum: AdamW has no such setting; it has lr, betas\n"
        "  stepz: Train has no such setting; did you mean 'steps'?"
    )


def test_a_typo_is_answered_with_the_nearest_name() -> None:
    assert told("model.head=8") == (
        "1 mistake in the config\n  model.head: Model has no such setting; did you mean 'heads'?"
    )


def test_a_name_like_none_is_answered_with_all_of_them() -> None:
    assert told("gpu=8") == (
        "1 mistake in the config\n"
        "  gpu: Train has no such setting; it has run, prompt, model, optimizer, steps"
    )


def test_a_missing_value_is_named() -> None:
    assert (
        told(edit=lambda tree: tree["model"].pop("heads"))
        == "1 mistake in the config\n  model.heads: missing"
    )


def test_a_value_left_for_the_user_is_named(sample: Path) -> None:
    (sample / "optimizer" / "adamw.yaml").write_text(
        "{_target_: megachat.sample.AdamW, lr: '???', betas: [0, 1]}"
    )
    assert told("steps=0") == (
        "2 mistakes in the config\n  optimizer.lr: missing\n  steps: input should be greater than 0, got 0"
    )
    assert decode(compose("train", ["optimizer.lr=2"])).optimizer.lr == 2.0


def test_a_pair_of_three_is_refused() -> None:
    assert told("optimizer.betas=[1,2,3]") == (
        "1 mistake in the config\n"
        "  optimizer.betas: tuple should have at most 2 items after validation, not 3, got [1, 2, 3]"
    )


def test_a_whole_number_may_be_written_as_a_float_but_not_a_half_one() -> None:
    assert decode(compose("train", ["steps=2e3"])).steps == 2000
    assert told("steps=1.5") == (
        "1 mistake in the config\n"
        "  steps: input should be a valid integer, got a number with a fractional part, got 1.5"
    )


def test_settings_that_contradict_each_other_are_reported_for_their_block() -> None:
    assert (
        told("model.heads=5") == "1 mistake in the config\n  model: dim (64) must be a multiple of heads (5)"
    )


def test_a_field_may_say_what_it_wants_in_its_own_words() -> None:
    assert told("prompt=rude words") == "1 mistake in the config\n  prompt: be polite, got 'rude words'"


def test_a_block_of_the_wrong_class_is_refused() -> None:
    assert told("optimizer=wrong") == (
        "1 mistake in the config\n"
        "  optimizer: expected a block of settings (Optimizer), got Model(dim=64, heads=4, kind='gpt')"
    )


def test_a_number_in_place_of_a_block_is_refused() -> None:
    def edit(tree: dict[str, Any]) -> None:
        tree["model"] = 3

    assert told(edit=edit) == "1 mistake in the config\n  model: expected a block of settings (Model), got 3"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("os.system", "only classes under 'megachat.' may be named"),
        ("megachat.sample.helper", "it is not a block of settings"),
        ("megachat.sample.Optimizer", "it is abstract; name one of its subclasses"),
        ("megachat.sample.Sgd", "module 'megachat.sample' has no attribute 'Sgd'"),
        ("megachat.nothing.Sgd", "No module named 'megachat.nothing'"),
    ],
)
def test_a_target_must_be_a_block_of_settings_of_this_package(target: str, why: str) -> None:
    # Its settings are not judged: which class they belong to is unknown.
    assert told(f"optimizer._target_={target}", "steps=0") == (
        f"2 mistakes in the config\n  optimizer._target_: cannot use {target!r}: {why}\n"
        "  steps: input should be greater than 0, got 0"
    )


def test_an_unknown_option_is_answered_with_the_nearest_one_or_all() -> None:
    assert told("model=smal") == "model: there is no 'smal'; did you mean 'small'?"
    assert told("model=3") == "model: there is no '3'; conf/model/ has large, small"


def test_unknown_options_are_all_listed() -> None:
    assert told("model=larg", "model=x").splitlines() == [
        "model: there is no 'larg'; did you mean 'large'?",
        "model: there is no 'x'; conf/model/ has large, small",
    ]


def test_a_number_where_text_is_wanted_is_shown_how_to_quote_it() -> None:
    told_so = told("prompt=42")
    assert "prompt: input should be a valid string, got 42; as text it is prompt=\"'42'\"" in told_so


def test_a_block_that_the_stage_does_not_have_cannot_be_chosen() -> None:
    assert told("model=small", stage="chat") == "model: this stage has no such block to choose"


def test_a_value_may_be_derived_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(model: Model) -> int:
        return 2 * model.dim

    wide.__module__ = "megachat.sample"
    monkeypatch.setattr(sys.modules["megachat.sample"], "wide", wide, raising=False)
    monkeypatch.setattr(config, "DERIVING", "megachat.sample")
    assert decode(compose("train", ["steps=${derived:wide,${model}}"])).steps == 128
    assert decode(compose("train", ["steps=${derived:wide,${model}}", "model=large"])).steps == 1024
    assert "steps: megachat.sample has no function 'wise'; did you mean 'wide'?" in told(
        "steps=${derived:wise}"
    )


def test_an_unknown_experiment_is_answered_with_the_nearest_or_all_experiments() -> None:
    assert told("experiment=tinny") == "experiment: there is no 'tinny'; did you mean 'tiny'?"
    assert told("experiment=x") == "experiment: there is no 'x'; conf/experiment/ has other, tiny"
    assert told("experiment=") == "experiment: there is no ''; conf/experiment/ has other, tiny"


@pytest.mark.parametrize("word", ["steps", "--help", "=3", "+=3"])
def test_a_word_that_is_not_a_setting_is_refused(word: str) -> None:
    assert told(word) == f"{word}: not a setting; write key=value"


def test_an_experiment_overrides_the_stage_and_the_command_line_overrides_both() -> None:
    tiny = decode(compose("train", ["steps=5", "experiment=tiny"]))
    assert (tiny.run, tiny.model.dim, tiny.steps) == (Path("runs/tiny"), 512, 5)
    for order in (["experiment=tiny", "run=here"], ["run=here", "experiment=tiny"]):
        assert decode(compose("train", order)).run == Path("here")


def test_an_experiment_without_this_stage_only_names_the_run() -> None:
    other = decode(compose("train", ["experiment=other"]))
    assert (other.run, other.model.dim, other.steps) == (Path("runs/other"), 64, 10)


UNLEXABLE = [
    "语言",
    "What's f(a, b)?",
    'say "hi", you',
    "[1, 2",
    "{a",
    "a=b",
    "back\\slash",
    "it's C:\\",
    r"What's \d in a regex, or \'?",
    "two\nlines",
    "",
    "}",
    "<|user|>",
]


@pytest.mark.parametrize("value", UNLEXABLE)
def test_a_value_arrives_as_typed(value: str) -> None:
    assert decode(compose("train", [f"prompt={value}"])).prompt == value


def test_a_run_may_have_a_chinese_name() -> None:
    assert decode(compose("train", ["run=runs/中文"])).run == Path("runs/中文")


def test_a_list_of_what_hydra_cannot_lex_stays_a_list() -> None:
    assert compose("train", ["prompt=[语料/*.txt, it's, 3]"])["prompt"] == ["语料/*.txt", "it's", 3]


def test_a_list_of_choices_is_left_alone_in_a_sweep_and_quoted_elsewhere() -> None:
    assert rewrite("train", ["steps=1,2"], sweep=True) == ["++steps=1,2"]
    assert rewrite("train", ["prompt=1,2"]) == ["++prompt='1,2'"]


def test_what_hydra_understands_is_passed_on() -> None:
    given = ["model=large", "+new=1", "~prompt", "hydra.verbose=true", "steps=3"]
    assert rewrite("train", given) == ["model=large", "+new=1", "~prompt", "hydra.verbose=true", "++steps=3"]


def test_interpolations_arrive_resolved() -> None:
    assert compose("train", ["prompt=${run}/x"])["prompt"] == "runs/main/x"
    assert told("prompt=${nothing}").startswith("Interpolation key 'nothing' not found")
