"""Text that is made to take long: everything that reads documents does so in linear time."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from megachat.config import compose, decode
from megachat.data.contamination import tokens
from megachat.data.document import Document
from megachat.data.language import language_of
from megachat.data.repair import normalise
from megachat.data.sources.wikipedia import HOLES, VARIANTS

SIZE = 200_000

UNITS = [
    ".", "。", "?! ", " ", "\n", "\x0c", "\u0301\u0323", "\u0f73", "\u200c", "\U000e0041", "a@a@a@", "0",
    "1.", "+1", "2222:", "-", "<", "&", '"', ".'", "[", "-{", "(", "（ ", "a:", "字", "的。", "\u0e01\u0e31",
    "１", "\xc3\x83", "\ud83d", "a ",
]  # fmt: skip


def readers() -> dict[str, Callable[[str], Any]]:
    """What is done with a text between its source and the table of its scores, but for models of language."""
    found: dict[str, Callable[[str], Any]] = {
        "normalise": normalise,
        "language_of": language_of,
        "tokens": lambda text: sum(1 for _ in tokens(text)),
        "holes": lambda text: HOLES.sub("", text),
        "variants": lambda text: VARIANTS.sub("", text),
    }
    for name in ("default", "web"):
        found[f"repair {name}"] = decode(compose(f"repair/{name}")["repair"]).apply
    for name in ("c4", "web"):
        rule = decode(compose(f"boilerplate/{name}")["boilerplate"])
        for language in ("en", "zh"):
            found[f"boilerplate {name} {language}"] = lambda text, r=rule, of=language: r.apply(text, of)
    mask = decode(compose("privacy/mask")["privacy"])
    for language in ("en", "code"):
        found[f"privacy {language}"] = lambda text, of=language: mask.apply(text, of)
    for name in ("default", "web"):
        for rule, filter in decode(compose("clean", [f"filters={name}"])).filters.items():
            of = "en" if filter.applies("en") else filter.applies_to[0]
            found[f"filter {rule} of {name}"] = lambda text, f=filter, of=of: f.measure(
                Document("x", text, "s", of)
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", readers())
def test_no_text_takes_more_than_linear_time(name: str) -> None:
    pytest.importorskip("ftfy")
    read = readers()[name]
    for unit in UNITS:
        # Where it goes on otherwise is where a match that has begun is given up.
        half = (unit * SIZE)[: SIZE // 2]
        text = f"{half}x\n{half} \u00e9"
        start = time.process_time()
        read(text)
        # Linear ones take a tenth of a second, quadratic ones a minute and more.
        taken = time.process_time() - start
        assert taken < 4, f"{taken:.1f} s for {unit!r}"
