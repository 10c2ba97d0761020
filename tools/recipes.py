"""What each recipe of conf/experiment/ is expected to need: python tools/recipes.py [--write]

Tokens and steps are those of its settings, memory is that of `megachat.train.memory`, MFU that of
`megachat.parallel.predict`, and days follow from it. `--write` puts them into the recipes and the READMEs.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of a script, only its own folder is there

from megachat.config import compose, decode
from megachat.parallel.predict import H100, Step, step
from megachat.parallel.volume import Layout
from megachat.stages import CONF
from megachat.train.forecast import Job, short
from megachat.train.pretrain import Pretrain

RECIPES = ["gpt_125m_1gpu", "gpt_1b_8gpu", "gpt_7b_256gpu", "gpt_70b_1024gpu"]
READMES = [CONF.parent / "README.md", CONF.parent / "README.zh-CN.md"]
DAY = 86_400


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, and what follows from them on as many H100 as its name says."""

    name: str
    settings: Pretrain
    vocab: int
    gpus: int

    @staticmethod
    def read(name: str) -> "Recipe":
        """From conf/experiment/<name>/."""
        match = re.search(r"_(\d+)gpu$", name)
        assert match is not None, f"{name} does not say on how many GPUs"
        settings = decode(compose("pretrain", [f"experiment={name}"]))
        vocab = decode(compose("tokenizer", [f"experiment={name}"])).vocab
        return Recipe(name, settings, vocab, int(match[1]))

    @property
    def job(self) -> Job:
        """As the memory's formula sees it."""
        run = self.settings
        return Job(
            run.model, self.vocab, run.parallel, run.optimizer, run.batch, run.micro_batch, run.context,
            self.gpus, bf16=True, cuda=True,
        )  # fmt: skip

    @property
    def layout(self) -> Layout:
        """As the network's formula sees it."""
        return self.job.layout

    @property
    def step(self) -> Step:
        """One step, predicted."""
        return step(self.settings.model, self.vocab, self.layout, H100)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        assert self.settings.tokens is not None
        return self.settings.tokens

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.tokens // (self.settings.batch * self.settings.context)

    @property
    def days(self) -> float:
        """Without failures, validation, and checkpoints."""
        return self.job.seconds(self.tokens, H100.peak, self.step.mfu) / DAY

    def expected(self) -> str:
        """The line of its YAML."""
        tokens = short(self.settings.batch * self.settings.context)
        return (
            f"# Expected: {self.memory} of 80 a GPU; {self.steps:,} steps of {tokens} tokens, "
            f"{self.step.seconds:.2g} s each: {days(self.days)} at an MFU of {self.step.mfu:.0%}."
        )

    @property
    def memory(self) -> str:
        """At its peak, of one GPU."""
        return f"{self.job.memory.peak / 2**30:.0f} GiB"

    def row(self) -> str:
        """The line of the READMEs' table."""
        run, parallel = self.settings, self.settings.parallel
        tensor = f" x TP {parallel.tensor}" if parallel.tensor > 1 else ""
        cells = [
            f"`{self.name}`", short(self.tokens), short(run.batch * run.context), f"{run.optimizer.lr:g}",
            f"ZeRO {parallel.zero}, DP {self.job.data}{tensor}", self.memory, f"{self.step.mfu:.0%}",
            days(self.days),
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def days(count: float) -> str:
    """Two digits. Example: days(0.0531) -> "1.3 h"."""
    return f"{24 * count:.2g} h" if count < 1 else f"{count:.2g} d"


def main() -> None:
    """Prints the lines, or writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("WORLD_SIZE", "8")
    for recipe in map(Recipe.read, RECIPES):
        print(recipe.row())
        if given.write:
            write(CONF / "experiment" / recipe.name / "pretrain.yaml", "# Expected:", recipe.expected())
            for readme in READMES:
                write(readme, f"| `{recipe.name}` |", recipe.row())


def write(path: Path, start: str, line: str) -> None:
    """Replaces the line that begins so."""
    lines = path.read_text(encoding="utf-8").splitlines()
    places = [number for number, text in enumerate(lines) if text.startswith(start)]
    assert len(places) == 1, f"{path} has {len(places)} lines that begin with {start!r}"
    lines[places[0]] = line
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
