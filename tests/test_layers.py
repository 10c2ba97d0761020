"""The parts of megachat form a chain: each imports only those before it, and can be read without the rest."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megachat"
CHAIN = [
    "stages files", "config slurm", "log run",
    "data", "tokenizer", "model", "parallel", "evals", "train", "align", "serve", "pipeline",
]  # fmt: skip
"""`log` and `run` are one link: they may import each other."""
PLACE = {name: place for place, names in enumerate(CHAIN) for name in names.split()}
ANYTHING = ["__init__", "__main__"]
"""Outside the chain: `__main__` starts any stage; nobody imports it."""

AT_HOME = {"deepspeed": "parallel/engine.py", "wandb": "log.py"}
"""A library that would seep everywhere is imported in one file."""

WITHOUT = {"torch": ["stages", "files", "slurm", "config", "log", "run", "data", "tokenizer"]}
"""Cleaning text with a hundred processes must not load torch a hundred times."""


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from megachat import log` imports megachat.log, `from megachat.log import say` does so, too.
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(package: Path) -> list[str]:
    """One line for each import that breaks a rule."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        here = file.split("/")[0].removesuffix(".py")
        if here not in PLACE and here not in ANYTHING:
            wrong.append(f"{file}: {here} has no place in the chain; give it one in tests/test_layers.py")
            continue
        for name in sorted(imported(ast.parse(path.read_text(encoding="utf-8")))):
            first, *rest = name.split(".")
            if not first:
                wrong.append(f"{file}: {name} is relative; write imports in full")
            elif first == package.name and rest and rest[0] == "__main__":
                wrong.append(f"{file}: nothing imports __main__")
            elif first == package.name and rest and PLACE.get(rest[0], -1) > PLACE.get(here, len(CHAIN)):
                wrong.append(f"{file}: {here} comes before {rest[0]}, so it may not import it")
            elif first in AT_HOME and file != AT_HOME[first]:
                wrong.append(f"{file}: only {AT_HOME[first]} imports {first}")
            elif here in WITHOUT.get(first, []):
                wrong.append(f"{file}: {here} does without {first}")
    return wrong


def test_imports_point_one_way() -> None:
    assert wrong_imports(PACKAGE) == []


def test_every_place_in_the_chain_is_taken() -> None:
    missing = [
        name for name in PLACE if not (PACKAGE / name).is_dir() and not (PACKAGE / f"{name}.py").is_file()
    ]
    assert missing == []


def test_a_package_that_breaks_every_rule_is_caught(tmp_path: Path) -> None:
    package = tmp_path / "megachat"
    files = {
        "__main__.py": "from megachat.pipeline import Pipeline",  # may import anything
        "config.py": "import os, torch, megachat.run",
        "data/clean.py": "from megachat.tokenizer.tokenizer import Tokenizer\nfrom megachat.run import Stage",
        "data/late.py": "def late():\n    from megachat import model",  # in a function, and as a name
        "model/gpt.py": "import torch, deepspeed.zero\nfrom megachat.data import shards",
        "parallel/engine.py": "import deepspeed, wandb",
        "serve/chat.py": "from .page import P\nimport megachat.pipeline\nfrom megachat.__main__ import main",
        "utils.py": "",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert wrong_imports(package) == [
        "config.py: config comes before run, so it may not import it",
        "config.py: config does without torch",
        "data/clean.py: data comes before tokenizer, so it may not import it",
        "data/late.py: data comes before model, so it may not import it",
        "model/gpt.py: only parallel/engine.py imports deepspeed",
        "parallel/engine.py: only log.py imports wandb",
        "serve/chat.py: .page.P is relative; write imports in full",
        "serve/chat.py: nothing imports __main__",
        "serve/chat.py: serve comes before pipeline, so it may not import it",
        "utils.py: utils has no place in the chain; give it one in tests/test_layers.py",
    ]
