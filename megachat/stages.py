"""Which stages there are, and where their settings lie: what `megachat --help` needs, and no heavy import."""

import difflib
from collections.abc import Iterable
from pathlib import Path

INSTALLED = Path(__file__).parent / "conf"
CONF = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1] / "conf"
"""The wheel carries `conf/` inside the package; in a checkout it stands beside it."""

ORDER = "clean tokenizer encode doctor pretrain sft rm ppo dpo kto grpo evaluate report pipeline chat".split()
"""How the stages are listed: as data flows. One that is not named here comes last."""


SETTINGS_OF = {"doctor": "pretrain"}
"""Stages that take another's settings, also those of an experiment."""


def stages() -> dict[str, str]:
    """Every stage and its one-line description, which is the first comment of `conf/<stage>.yaml`."""
    described = {}
    for path in CONF.glob("*.yaml"):
        with path.open(encoding="utf-8") as file:
            described[path.stem] = file.readline().removeprefix("#").strip()
    last = len(ORDER)
    return dict(
        sorted(described.items(), key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else last, item))
    )


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """A question with the known name most like this one, or `otherwise` where none is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise
