"""How fast would layouts train on clusters nobody has tried? python tools/bench/predict.py

The recipes of conf/experiment/, other layouts of the largest one, and runs that others have published, by
`megachat.parallel.predict` and `megachat.train.memory`. Nothing is run. A dash is a batch with too few rows
for so many ranks; brackets are a layout that does not fit.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.parallel.predict import H100, step
from megachat.parallel.volume import Layout
from megachat.train.memory import ROOM
from tools.recipes import RECIPES, Recipe

GPUS = [8, 256, 1024, 16_384]
LAYOUTS = [
    {"zero": 1, "tensor": 8}, {"zero": 2, "tensor": 8}, {"zero": 2, "tensor": 4}, {"zero": 3, "tensor": 4},
    {"zero": 3, "tensor": 2}, {"zero": 3, "tensor": 1},
]  # fmt: skip
"""Of the largest recipe, all with checkpointing."""


class Published(NamedTuple):
    """An MFU that somebody has measured on H100s with all ranks sharding all (ZeRO 3, or FSDP)."""

    recipe: str
    """Ours with the nearest shape."""
    gpus: int
    seq: int
    micro_batch: int
    micro_batches: int
    checkpointing: bool
    mfu: float


PUBLISHED = [
    Published("gpt_1b_8gpu", 8, 4096, 7, 4, False, 0.4026),
    Published("gpt_1b_8gpu", 64, 2048, 20, 1, False, 0.4085),
    Published("gpt_7b_256gpu", 8, 2048, 6, 1, False, 0.4644),
    Published("gpt_7b_256gpu", 8, 4096, 16, 2, True, 0.4042),
    Published("gpt_70b_1024gpu", 32, 2048, 2, 16, True, 0.3615),
    Published("gpt_70b_1024gpu", 64, 2048, 8, 4, True, 0.4257),
]
"""https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md (bf16). It counts
attention as a whole square, which makes its MFU higher by some hundredths of itself at 2,048 tokens."""


def main() -> None:
    """Prints the tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    os.environ.setdefault("WORLD_SIZE", "8")
    recipes = [*map(Recipe.read, RECIPES)]
    print(f"{'MFU at GPUs':<34}" + "".join(f"{gpus:>10,}" for gpus in GPUS))
    for recipe in recipes:
        for name, grown in [(recipe.name, False), ("  its batch grows with them", True)]:
            print(f"{name:<34}" + "".join(f"{cell(recipe, gpus, grown):>10}" for gpus in GPUS))
    print()
    for line in layouts(recipes[-1]):
        print(line)
    print()
    for line in published(recipes):
        print(line)


def cell(recipe: Recipe, gpus: int, grown: bool) -> str:
    """The MFU of a recipe on other GPUs; `grown`: with as many rows for each as in the recipe."""
    run = recipe.settings
    batch = run.batch * gpus // recipe.gpus if grown else run.batch
    if gpus % run.parallel.tensor or batch < gpus // run.parallel.tensor:
        return "-"
    one = replace(recipe, settings=run.model_copy(update={"batch": batch}), gpus=gpus)
    text = f"{one.step.mfu:.1%}"
    return text if fits(one) else f"({text})"


def fits(recipe: Recipe) -> bool:
    """Into 80 GiB, of which some is not for tensors."""
    return recipe.job.memory.peak <= ROOM * 80 * 2**30


def layouts(recipe: Recipe) -> Iterator[str]:
    """Where the seconds of a step go in other layouts of a recipe."""
    columns = ["GiB", "step, s", "products", "tensor", "data", "hidden", "MFU"]
    yield f"{recipe.name:<34}" + "".join(f"{column:>10}" for column in columns)
    for chosen in LAYOUTS:
        run = recipe.settings
        parallel = run.parallel.model_copy(update=chosen)
        other = replace(recipe, settings=run.model_copy(update={"parallel": parallel, "micro_batch": 1}))
        found = other.step
        memory = f"{other.job.memory.peak / 2**30:.0f}"
        seconds = [found.seconds, found.products, found.tensor, found.data, found.hidden]
        name = f"  ZeRO {parallel.zero}, DP {other.job.data}, TP {parallel.tensor}"
        yield (
            f"{name:<34}{memory if fits(other) else f'({memory})':>10}"
            + "".join(f"{count:>10.2f}" for count in seconds)
            + f"{found.mfu:>10.1%}"
        )


def published(recipes: list[Recipe]) -> Iterator[str]:
    """The MFU that others have measured, beside what the formula makes of a layout like theirs."""
    columns = ["GPUs", "tokens", "again", "theirs", "predicted"]
    yield f"{'llm-foundry':<34}" + "".join(f"{column:>10}" for column in columns)
    shapes = {recipe.name: recipe for recipe in recipes}
    for one in PUBLISHED:
        recipe = shapes[one.recipe]
        layout = Layout(
            3, one.gpus, 1, one.micro_batches, one.micro_batch, one.seq, bf16=True,
            checkpointing=one.checkpointing,
        )  # fmt: skip
        found = step(recipe.settings.model, recipe.vocab, layout, H100).mfu
        name, again = one.recipe.rpartition("_")[0], "yes" if one.checkpointing else "no"
        row = f"  {name:<32}{one.gpus:>10}{one.micro_batch * one.seq:>10,}{again:>10}"
        yield f"{row}{one.mfu:>10.1%}{found:>10.1%}"


if __name__ == "__main__":
    main()
