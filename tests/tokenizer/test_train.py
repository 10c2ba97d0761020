"""What the tokenizer learns from, and what it learns."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest

from megachat.__main__ import main
from megachat.config import compose, decode
from megachat.data.document import Document, write_documents
from megachat.files import write_json
from megachat.run import Stage, finished, perform
from megachat.tokenizer.tokenizer import FILE, Tokenizer
from megachat.tokenizer.train import LINE, Smallest, balanced, budgets, lines, measure, sample, train
from tests.tiny_model import finish
from tests.tiny_run import environment

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


def of(language: str, count: int) -> list[Document]:
    """Documents of 100 bytes each."""
    return [Document(f"{language}{i}", f"{i:04}" * 25, "test", language) for i in range(count)]


def test_budgets_by_hand():
    # Square roots 30 and 10 share 400 as 300 and 100, and 100 as 75 and 25.
    assert budgets({"en": 900, "zh": 100}, 400, alpha=0.5) == {"en": 300, "zh": 100}
    assert budgets({"en": 900, "zh": 100}, 100, alpha=0.5) == {"en": 75, "zh": 25}
    assert budgets({"en": 900, "zh": 100}, 100, alpha=1.0) == {"en": 90, "zh": 10}
    # zh would get 250 and has 100: what it leaves goes to the others.
    assert budgets({"en": 900, "zh": 100, "code": 900}, 750, alpha=0.0) == {"en": 325, "zh": 100, "code": 325}
    assert budgets({"en": 900, "zh": 100}, 1000, alpha=0.3) == {"en": 900, "zh": 100}


def test_a_small_language_gets_its_share_and_the_order_does_not_matter():
    corpus = of("en", 900) + of("zh", 100)
    sizes = {"en": 90_000, "zh": 10_000}
    chosen = balanced(corpus, sizes, 40_000, 0.5, seed=0)
    assert Counter(one.language for one in chosen) == {"en": 300, "zh": 100}
    assert balanced(random.Random(0).sample(corpus, 1000), sizes, 40_000, 0.5, seed=0) == chosen
    english = sample(corpus[:900], 30_000, seed=0)
    assert [one for one in chosen if one.language == "en"] == english  # the smallest hashes, as everywhere


def test_a_corpus_that_fits_is_taken_whole_whatever_the_weighting():
    corpus = of("en", 90) + of("zh", 10)
    everything = sample(corpus, 10_000, seed=0)
    assert len(everything) == 100
    sizes = {"en": 9000, "zh": 1000}
    for alpha in (0.3, 1.0):
        assert balanced(corpus, sizes, 10_000, alpha, seed=0) == everything


def test_as_in_the_corpus_is_the_sample_that_knows_no_languages():
    corpus = of("en", 90) + of("zh", 10)
    assert balanced(corpus, {"en": 9000, "zh": 1000}, 5000, 1.0, seed=0) == sample(corpus, 5000, seed=0)


def test_no_more_than_the_budget_is_held_while_a_corpus_is_read():
    smallest = Smallest(1000, seed=0)
    for document in of("en", 500):
        smallest.offer(document)
        assert sum(size for *_, size in smallest._heap) < 1000 + 100  # and the document that crosses it


def test_a_language_holds_its_own_budget_not_that_of_all(monkeypatch):
    held, offer = 0, Smallest.offer

    def counted(self, document):
        nonlocal held
        held -= self._size
        offer(self, document)
        held += self._size
        assert held < 40_000 + 2 * 100  # and in each language the document that crosses its budget

    monkeypatch.setattr(Smallest, "offer", counted)
    balanced(of("en", 900) + of("zh", 900), {"en": 90_000, "zh": 90_000}, 40_000, 0.5, seed=0)
    assert held >= 40_000


def test_two_sources_with_the_same_ids_may_come_in_any_order():
    corpus = [Document(f"{i}", f"{name}{i:03}" * 25, name) for i in range(50) for name in "ab"]
    corpus += [Document("7", "other text " * 9 + "x", "a")]  # an id that is there twice
    chosen = [sample(random.Random(order).sample(corpus, 101), 3350, seed=0) for order in range(5)]
    assert all(one == chosen[0] for one in chosen)
    assert len({one.source for one in chosen[0]}) == 2


def test_a_language_of_which_clean_said_nothing_is_named():
    with pytest.raises(ValueError, match=r"de0 of test is in 'de', of which the report of `clean` knows"):
        balanced(of("de", 1), {"en": 100}, 50, 0.5, seed=0)


def test_a_language_too_small_for_the_budget_is_left_out():
    assert balanced(of("en", 9) + of("zh", 1), {"en": 900, "zh": 0}, 400, 0.5, seed=0) == sample(
        of("en", 9), 400, seed=0
    )


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


def prepared(run, documents):
    """A run folder in which `clean` has finished."""
    write_documents(run / "clean", documents, per_shard=2)
    languages = {}
    for document in documents:
        own = languages.setdefault(document.language, {"documents": 0, "bytes": 0})
        own["documents"] += 1
        own["bytes"] += len(document.text.encode())
    write_json(run / "clean" / "report.json", {"languages": languages})
    finish(run / "clean")


def test_the_stage_writes_a_tokenizer_and_what_it_measured(run, texts):
    languages = ["code", "code", "zh"]
    documents = [Document(f"d{i}", text, "t", languages[i]) for i, text in enumerate(texts)]
    prepared(run, documents)
    stage(run, "sample_bytes=1000000").execute()
    tokenizer = Tokenizer.load(run / "tokenizer")
    report = json.loads((run / "tokenizer" / "report.json").read_text())
    assert (
        (report["vocab"], report["sha256"]) == (tokenizer.vocab, tokenizer.sha256) == (400, tokenizer.sha256)
    )
    spread = [len(text.encode()) for text in texts]
    by_language = {"code": spread[0] + spread[1], "zh": spread[2]}
    assert report["sample"] == {"documents": 3, "bytes": sum(spread), "languages": by_language}
    assert report["round_trips"] == 1003
    sizes = [(len(text.encode()), len(tokenizer.encode(text))) for text in texts]
    expected = {"code": sizes[:2], "zh": sizes[2:], "all": sizes}
    assert report["bytes_per_token"] == {
        name: round(sum(size for size, _ in some) / sum(count for _, count in some), 3)
        for name, some in sorted(expected.items())
    }
    assert report["characters_per_token"]["zh"] == round(len(texts[2]) / sizes[2][1], 3)
    assert sorted(path.name for path in (run / "tokenizer").iterdir()) == ["report.json", FILE]


def test_without_clean_text_the_stage_says_what_to_run(run):
    with pytest.raises(ValueError, match=r"tokenizer reads the output of `clean`.*run `megachat clean"):
        stage(run).execute()


def test_a_tokenizer_that_loses_text_is_caught(tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens: "lost")
    with pytest.raises(AssertionError, match="d1 does not come back as it went in"):
        measure(tokenizer, [Document("d1", "text", "test")])


KILLED = """
import contextlib, os, signal, sys
from megachat.__main__ import main
from megachat.tokenizer import tokenizer, train
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "save":
    replacing = tokenizer.replacing
    @contextlib.contextmanager
    def half(path):
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            die()
            yield
    tokenizer.replacing = half
else:
    train.write_json = die                      # the tokenizer is there, its report is not
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_stage_makes_the_same_bytes_when_it_runs_again(run, texts):
    documents = [Document(f"d{i}", text, "t", "code") for i, text in enumerate(texts)]
    settings = ["vocab=400", "sample_bytes=20000", "threads=1", "log.wandb=disabled"]
    prepared(run / "whole", documents)
    perform(Stage.of(compose("tokenizer", [f"run={run / 'whole'}", *settings])))
    prepared(run / "killed", documents)
    arguments = ["tokenizer", f"run={run / 'killed'}", *settings]
    for place in ("save", "report"):
        command = [sys.executable, "-c", KILLED, place, *arguments]
        done = subprocess.run(command, env=environment(), check=False)
        assert done.returncode == -signal.SIGKILL, place
        assert not finished(run / "killed" / "tokenizer")
    main(arguments)
    outputs = [finished(run / name / "tokenizer")["outputs"] for name in ("whole", "killed")]
    assert [*outputs[0]] == ["report.json", FILE]
    assert outputs[0] == outputs[1]
