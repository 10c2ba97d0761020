"""What the documents say can be typed: every command in them decodes, every file they name is there."""

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from megachat.config import compose, decode
from megachat.stages import stages

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "README.zh-CN.md", "slurm/README.md", ".github/CONTRIBUTING.md"]
RECORDS = [".github/CHANGELOG.md", ".github/DECISIONS.md", ".github/SCALING.md"]
SCRIPTS = {
    "tools/quickstart.sh": ["pipeline", "experiment=quickstart"],
    "slurm/pretrain.sh": ["pretrain"],
    "slurm/sft.sh": ["sft"],
    "slurm/rlhf.sh": ["rm"],
    "slurm/data.sh": ["clean"],
}
"""Scripts that run a stage with the overrides they are given."""


@pytest.fixture(autouse=True)
def eight_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism is checked against the size of the job."""
    monkeypatch.setenv("WORLD_SIZE", "8")


def blocks(document: str) -> list[str]:
    """The fenced code blocks of a document that hold shell commands."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def lines(document: str) -> Iterator[list[str]]:
    """Each command line as words, continued lines joined, comments and prompts removed."""
    for block in blocks(document):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\w+=\$\(([^)]*)\)", r"\1", line), comments=True)  # job=$(sbatch ...)
            for separator, part in itertools.groupby(words, lambda word: word in ("&&", "|", ";")):
                if not separator:
                    yield list(part)


def commands(document: str) -> list[list[str]]:
    """Each line that runs a stage: [stage, *overrides]."""
    found = []
    for words in lines(document):
        settings = dict(
            word.split("=", 1)
            for word in itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), words)
        )
        words = words[len(settings) :]
        script = next((index for index, word in enumerate(words) if word in SCRIPTS), None)
        if words[:1] == ["megachat"]:
            found.append(words[1:])
        elif "megachat" in words and words[words.index("megachat") - 1] == "-m":
            found.append(words[words.index("megachat") + 1 :])
        elif script is not None:
            stage, *fixed = SCRIPTS[words[script]]
            found.append([settings.get("STAGE", stage), *fixed, *words[script + 1 :]])
    return found


def single_runs(overrides: list[str]) -> Iterator[list[str]]:
    """The runs of a sweep (`-m lr=1,2`), or the one run."""
    settings = [word for word in overrides if "=" in word]
    if "-m" not in overrides:
        yield settings
        return
    choices = []
    for setting in settings:
        parsed = OverridesParser.create().parse_override(setting)
        values = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [setting.partition("=")[2]]
        choices.append([f"{parsed.get_key_element()}={value}" for value in values])
    yield from (list(run) for run in itertools.product(*choices))


@functools.cache
def decodes(stage: str, *settings: str) -> None:
    """Raises otherwise. Once for each command: both READMEs show most of them."""
    decode(compose(stage, settings))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_decodes(document: str) -> None:
    for stage, *overrides in commands(document):
        if stage.startswith("-"):  # megachat --help
            continue
        assert stage in stages(), f"{document}: megachat {stage}"
        for settings in single_runs(overrides):
            decodes(stage, *settings)


def test_both_readmes_show_the_same_commands_for_every_stage() -> None:
    english, chinese = ([words[0] for words in commands(name)] for name in ("README.md", "README.zh-CN.md"))
    assert english == chinese
    assert set(english) >= set(stages())


def test_each_readme_leads_to_the_other_in_its_first_line() -> None:
    first = [
        (ROOT / name).read_text(encoding="utf-8").partition("\n")[0]
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert "(README.zh-CN.md)" in first[0]
    assert "(README.md)" in first[1]


@pytest.mark.parametrize("document", [*DOCUMENTS, *RECORDS])
def test_every_file_that_is_named_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    missing = []
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http") and not (ROOT / document).parent.joinpath(target).exists():
            missing.append(target)
    for path in re.findall(r"`((?:megachat|conf|tests|tools|slurm|\.github)/[\w./-]*)`", text):
        if not (ROOT / path).exists():
            missing.append(path)
    for words in lines(document):
        missing += [
            word
            for word in words
            if re.fullmatch(r"(tools|slurm|tests)/[\w./]+", word) and not (ROOT / word).exists()
        ]
    assert missing == []


def test_a_stage_that_does_not_exist_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "megachat clean && megachat pretrian \\",
        "  m=1  # typo",
        "STAGE=sft sbatch -N 2 slurm/pretrain.sh a=1",
    ]
    text = "\n".join(["```bash", *lines, "```", ""])
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr("tests.test_readme.ROOT", tmp_path)
    assert commands("README.md") == [["clean"], ["pretrian", "m=1"], ["sft", "a=1"]]
    with pytest.raises(AssertionError, match="megachat pretrian"):
        test_every_command_decodes("README.md")
