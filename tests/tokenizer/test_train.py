"""What the tokenizer learns from, and what it learns."""

import json
import random

import pytest

from megachat.config import compose, decode
from megachat.data.document import Document, write_documents
from megachat.tokenizer.tokenizer import FILE, Tokenizer
from megachat.tokenizer.train import LINE, lines, measure, sample, train
from tests.tiny_model import finish

DOCUMENTS = [Document(f"d{i}", f"{i:04}" * 25, "test") for i in range(100)]  # of 100 bytes each


def test_a_sample_does_not_depend_on_the_order_of_the_corpus():
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    assert sample(shuffled, 1000, seed=0) == sample(DOCUMENTS, 1000, seed=0)


def test_a_sample_has_the_bytes_it_may_have_and_follows_the_seed():
    ids = [[document.id for document in sample(DOCUMENTS, 1000, seed)] for seed in range(2)]
    assert [len(one) for one in ids] == [10, 10]
    assert ids[0] != ids[1]
    assert len(sample(DOCUMENTS, 10**6, seed=0)) == 100


def test_a_larger_sample_begins_with_the_smaller():
    assert sample(DOCUMENTS, 3000, seed=0)[:10] == sample(DOCUMENTS, 1000, seed=0)


def test_the_last_document_of_a_sample_is_cut_between_characters():
    documents = [Document(name, "中" * 100, "test") for name in "ab"]
    first, last = sample(documents, 400, seed=0)
    assert (len(first.text), last.text) == (100, "中" * 33)  # 300 bytes, and 33 * 3 = 99 of the 100 left


def test_lines_for_the_trainer_are_short_and_lose_nothing():
    text = "short\n" + "x" * 9000 + "\n" + "中" * 5000 + "\n" + "line\n" * 2000
    pieces = list(lines(text))
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= LINE
    assert len(pieces) < 20  # several lines stay together


def test_what_the_trainer_would_skip_a_line_for_is_cut_out():
    assert list(lines("a\u2585b\u2581c")) == ["a\nb\nc"]


def test_a_long_line_is_learnt_from():
    # Over 4,192 bytes sentencepiece skips a line without a word: then no token but bytes would be learnt.
    tokenizer = train(["abcdefgh" * 2000], vocab=280, character_coverage=1.0, threads=1)
    assert len(tokenizer.encode("abcdefgh" * 2)) <= 2


def test_the_same_texts_give_the_same_tokenizer_to_the_byte(tokenizer, texts):
    assert train(texts, 800, 0.9995, threads=1).sha256 == tokenizer.sha256


def test_the_vocabulary_does_not_depend_on_the_threads(tokenizer, texts):
    other = train(texts, 800, 0.9995, threads=3)
    assert other._bytes == tokenizer._bytes


def test_indentation_is_one_token(tokenizer):
    for spaces in (4, 8):
        assert len(tokenizer.encode(" " * spaces)) == 1
    assert len(tokenizer.encode("\n        return")) <= 3


def test_digits_are_tokens_of_their_own_however_frequent_the_number():
    tokenizer = train(["the year 2026 and 2026 again"] * 50, vocab=300, character_coverage=1.0, threads=1)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2026")] == ["2", "0", "2", "6"]


def test_frequent_chinese_characters_are_tokens(tokenizer):
    assert len(tokenizer.encode("这个函数是做什么的？")) <= 10
    assert len(tokenizer.encode("龘")) == 3  # never seen: its bytes


@pytest.mark.parametrize(
    ("vocab", "remedy"), [(5000, "use a smaller vocab or more text"), (300, "use a larger vocab")]
)
def test_an_impossible_vocabulary_says_what_to_do(vocab, remedy):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 100)))
    with pytest.raises(ValueError, match=rf"vocab={vocab} cannot be learnt from this text; .*{remedy}"):
        train([text], vocab, character_coverage=1.0, threads=1)


def stage(run, *overrides):
    """The stage with these settings."""
    return decode(compose("tokenizer", [f"run={run}", "vocab=400", "sample_bytes=20000", *overrides]))


def test_the_stage_writes_a_tokenizer_and_what_it_measured(run, texts):
    languages = ["code", "code", "zh"]
    documents = [Document(f"d{i}", text, "t", languages[i]) for i, text in enumerate(texts)]
    write_documents(run / "clean", documents, per_shard=2)
    finish(run / "clean")
    stage(run, "sample_bytes=1000000").execute()
    tokenizer = Tokenizer.load(run / "tokenizer")
    report = json.loads((run / "tokenizer" / "report.json").read_text())
    assert (
        (report["vocab"], report["sha256"]) == (tokenizer.vocab, tokenizer.sha256) == (400, tokenizer.sha256)
    )
    assert report["sample"] == {"documents": 3, "bytes": sum(len(text.encode()) for text in texts)}
    assert report["round_trips"] == 1003
    sizes = [(len(text.encode()), len(tokenizer.encode(text))) for text in texts]
    expected = {"code": sizes[:2], "zh": sizes[2:], "all": sizes}
    assert report["bytes_per_token"] == {
        name: round(sum(size for size, _ in some) / sum(count for _, count in some), 3)
        for name, some in sorted(expected.items())
    }
    assert sorted(path.name for path in (run / "tokenizer").iterdir()) == ["report.json", FILE]


def test_without_clean_text_the_stage_says_what_to_run(run):
    with pytest.raises(ValueError, match=r"tokenizer reads the output of `clean`.*run `megachat clean"):
        stage(run).execute()


def test_a_tokenizer_that_loses_text_is_caught(tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens: "lost")
    with pytest.raises(AssertionError, match="d1 does not come back as it went in"):
        measure(tokenizer, [Document("d1", "text", "test")])
