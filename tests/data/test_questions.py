"""True answers, wrong ones of three kinds, and what is held out never trained on."""

import random
from collections import Counter

import pytest

from megachat.config import compose, decode
from megachat.data import questions
from megachat.data.conversations import Message
from megachat.data.harvest import Entry
from megachat.data.questions import (
    HELD_OUT,
    KINDS,
    PRACTICE,
    SEEN,
    SMALL_TALK,
    PythonConversations,
    PythonPreferences,
    PythonPrompts,
    Spoiler,
    home,
)

LIBRARY = [
    Entry(f"m{i % 8}.f{i}", "function", f"Return the number {i} of {i % 8} things, counted twice.")
    for i in range(120)
]
TRUE = {
    phrasings: {one.format(name=entry.name): entry.sentence for one in phrasings for entry in LIBRARY}
    for phrasings in (SEEN, HELD_OUT, SEEN + PRACTICE)
}
SETTINGS = {"modules": [], "functions": 100, "held_out": 0.2, "seed": 0}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """120 functions of eight modules, instead of Python's."""
    monkeypatch.setattr(questions, "entries", lambda: list(LIBRARY))


def conversations(**settings):
    return PythonConversations(**{**SETTINGS, "variants": 3, "follow_ups": 0.0, "small_talk": 0, **settings})


def preferences(**settings):
    return PythonPreferences(**{**SETTINGS, "variants": 3, "further": 0, "further_variants": 1, **settings})


def prompts(**settings):
    return PythonPrompts(**{**SETTINGS, "variants": 2, **settings})


def about(messages, phrasings) -> str:
    """The sentence that truly answers the last question of some messages."""
    return TRUE[phrasings][messages[-1].content]


def trained_on() -> set[str]:
    """All sentences that appear in training, in any part."""
    said = {m.content for one in conversations(follow_ups=0.5).conversations() for m in one.messages}
    for one in preferences().preferences("train"):
        said |= {one.chosen, one.rejected}
    return said | {one.answer for one in prompts().prompts("train")}


def test_there_are_enough_phrasings_and_no_two_alike():
    for phrasings, english, chinese in ((SEEN, 18, 5), (PRACTICE, 10, 2), (HELD_OUT, 4, 2)):
        assert sum(one.isascii() for one in phrasings) >= english
        assert sum(not one.isascii() for one in phrasings) >= chinese
    every = (*SEEN, *PRACTICE, *HELD_OUT)
    assert len(set(every)) == len(every)
    assert all(one.count("{name}") == 1 for one in every)


def test_every_question_gets_its_true_answer_in_as_many_ways_as_asked_for():
    made = conversations().conversations()
    assert all(one.messages[-1].content == about(one.messages[:-1], SEEN) for one in made)
    assert len({one.messages[0].content for one in made}) == len(made)
    times = Counter(one.messages[-1].content for one in made)
    assert set(times.values()) == {3}
    assert 60 <= len(times) < 100  # of 100 functions about a fifth is held out


def test_what_is_held_out_is_in_no_training_set_not_even_as_a_wrong_answer():
    held_out = {one.chosen for one in preferences().preferences("held_out")}
    assert len(held_out) >= 5
    assert {one.answer for one in prompts().prompts("held_out")} == held_out
    assert not held_out & trained_on()
    whole = {one.sentence for one in LIBRARY}
    assert {one.rejected for one in preferences().preferences("held_out")} & whole <= held_out


def test_what_is_held_out_does_not_depend_on_the_other_settings():
    few, many = (
        {one.answer for one in prompts(functions=functions, seed=seed, variants=1).prompts("held_out")}
        for functions, seed in ((50, 0), (100, 7))
    )
    assert few < many
    assert {one.answer for one in prompts(held_out=0.1).prompts("held_out")} < many


def test_evaluation_asks_about_what_was_trained_on_in_words_seen_and_unseen():
    trained = {one.messages[0].content for one in conversations().conversations()}
    seen, unseen = prompts().seen(1000), prompts().unseen(50)
    assert {one.messages[0].content for one in seen} <= trained
    assert len({one.answer for one in seen}) == len(seen) == len(trained) / 3
    for one in unseen:
        assert one.answer == about(one.messages, HELD_OUT)
    assert [one.answer for one in unseen] == [one.answer for one in seen[:50]]
    assert {one.kind for one in (*seen, *unseen)} == {"en", "zh"}


def test_no_phrasing_of_evaluation_is_ever_trained_on():
    asked = [one.messages for one in conversations(follow_ups=0.5).conversations()]
    for split in ("train", "held_out"):
        asked += [one.prompt for one in preferences().preferences(split)]
        asked += [one.messages for one in prompts().prompts(split)]
    said = {message.content for messages in asked for message in messages}
    assert not said & {phrasing.format(name=one.name) for phrasing in HELD_OUT for one in LIBRARY}


def test_more_unseen_questions_than_functions_come_in_other_words():
    count = len(prompts().seen(1000))
    asked = prompts().unseen(2 * count)
    assert len({one.messages for one in asked}) == len(asked) == 2 * count
    assert set(Counter(one.answer for one in asked).values()) == {2}


def test_two_thirds_of_each_functions_wrong_answers_show_only_beside_the_question():
    made = preferences(variants=6).preferences("train")
    times = Counter((one.chosen, one.kind) for one in made)
    assert {one.kind for one in made} == set(KINDS) == {"other", "spliced", "truncated", "garbled"}
    assert all(count == (2 if kind in ("other", "spliced") else 1) for (_, kind), count in times.items())
    assert all(one.chosen == about(one.prompt, SEEN + PRACTICE) != one.rejected for one in made)


def test_further_functions_show_flaws_alone_and_are_nobodys_wrong_answer():
    made = preferences(functions=60, variants=3, further=40, further_variants=2).preferences("train")
    often = {one.chosen for one in preferences(functions=60).preferences("train")}
    further = [one for one in made if one.chosen not in often]
    assert set(Counter(one.chosen for one in further).values()) == {2}
    assert Counter(one.kind for one in further)["truncated"] == len(further) / 2
    assert Counter(one.kind for one in further)["garbled"] == len(further) / 2
    assert {one.rejected for one in made if one.kind == "other"} <= often
    assert sum(one.chosen in often for one in made) == 3 * len(often)


def test_alignment_asks_in_words_that_fine_tuning_does_not():
    tuned = {one.messages[0].content for one in conversations(variants=len(SEEN)).conversations()}
    practised = {one.messages[0].content for one in prompts(variants=len(PRACTICE)).prompts("train")}
    asked = {phrasing.format(name=one.name) for phrasing in PRACTICE for one in LIBRARY}
    assert not tuned & asked
    assert practised < asked  # but for the functions that are held out


def test_a_spliced_answer_is_half_of_the_truth_and_half_of_another_answer():
    one = Entry("m.one", "function", "One two three four five six.")
    two = Entry("m.two", "function", "Seven eight nine ten eleven twelve.")
    made = {Spoiler([one, two]).spliced(one, random.Random(seed)) for seed in range(20)}
    assert made == {"One two three ten eleven twelve.", "Seven eight nine four five six."}


def test_a_truncated_answer_is_40_to_70_percent_of_the_words():
    made = [one for one in preferences().preferences("train") if one.kind == "truncated"]
    for one in made:
        assert one.chosen.startswith(one.rejected)
        assert one.rejected[-1] not in ".,"
        assert 0.4 * 9 - 0.5 <= len(one.rejected.split()) <= 0.7 * 9 + 0.5
    assert len({len(one.rejected.split()) for one in made}) > 1


def test_a_garbled_answer_has_the_same_words_in_another_order():
    for one in preferences().preferences("train"):
        if one.kind == "garbled":
            assert sorted(one.rejected[:-1].split()) == sorted(one.chosen[:-1].split())
            assert one.rejected != one.chosen
            assert one.rejected.endswith(".")


def test_words_are_shuffled_until_they_are_out_of_order():
    two = Entry("m.f", "function", "Swap words.")
    assert {questions.garbled(two, random.Random(seed)) for seed in range(20)} == {"words Swap."}


def test_half_of_the_other_answers_come_from_the_same_module():
    modules = {one.sentence: home(one) for one in LIBRARY}
    made = preferences(functions=120, held_out=0.0, variants=30).preferences("train")
    others = [one for one in made if one.kind == "other"]
    same = sum(modules[one.rejected] == modules[one.chosen] for one in others)
    # Half of 1,200 by choice, and of the others 14 of 119 by chance: 0.559; four standard deviations.
    assert len(others) == 1200
    assert 0.50 < same / len(others) < 0.62


@pytest.mark.parametrize("make", [conversations, preferences, prompts])
def test_a_set_is_the_same_every_time_and_another_with_another_seed(make):
    def all_of(seed):
        block = make(seed=seed)
        if make is conversations:
            return block.conversations()
        return block.preferences("train") if make is preferences else block.prompts("train")

    assert all_of(0) == all_of(0)
    assert all_of(0) != all_of(1)


def test_follow_ups_are_second_questions_with_true_answers():
    made = conversations(follow_ups=0.5).conversations()
    long = [one.messages for one in made if len(one.messages) == 4]
    assert 0.35 < len(long) / len(made) < 0.65
    for messages in long:
        assert messages[1].content == about(messages[:1], SEEN)
        assert messages[3].content == about(messages[:3], SEEN)


def test_small_talk_comes_as_often_as_asked_for():
    made = Counter(one.messages for one in conversations(small_talk=4).conversations())
    for said, reply in SMALL_TALK:
        assert made[(Message("user", said), Message("assistant", reply))] == 4


def test_modules_narrow_the_choice():
    made = conversations(modules=["m1", "m2"], functions=30).conversations()
    assert {home(one) for one in LIBRARY if one.sentence in {m.messages[-1].content for m in made}} == {
        "m1",
        "m2",
    }


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"functions": 121}, "functions=121: only 120 are documented; use that or fewer"),
        ({"modules": ["m1", "maths"]}, "modules: this Python documents no 'maths'"),
        ({"functions": 3}, "functions=3 with held_out=0.2 leaves .* use more functions"),
    ],
)
def test_too_much_asked_of_the_library_says_what_to_do(settings, why):
    with pytest.raises(ValueError, match=why):
        conversations(**settings).conversations()


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (conversations, len(SEEN)),
        (preferences, len(SEEN) + len(PRACTICE)),
        (prompts, len(PRACTICE)),
    ],
)
def test_more_variants_than_phrasings_are_refused(make, most):
    with pytest.raises(ValueError, match=f"less than or equal to {most}"):
        make(variants=most + 1)


def test_a_method_lives_in_the_module_of_its_class():
    assert home(Entry("a.b.C.d", "method", "")) == "a.b"
    assert home(Entry("a.b.C", "class", "")) == home(Entry("a.b.c", "function", "")) == "a.b"


def test_what_is_built_in_goes_by_its_short_name():
    assert questions.question("What is {name}?", Entry("builtins.len", "function", "")) == "What is len?"


def test_the_shipped_settings_agree_on_what_is_held_out(monkeypatch):
    monkeypatch.undo()  # the real library
    groups = ("conversations", "preferences", "prompts")
    blocks = [decode(compose(f"{group}/python")[group]) for group in groups]
    shared = [{name: getattr(block, name) for name in SETTINGS} for block in blocks]
    assert shared[0] == shared[1] == shared[2]
    made = blocks[0].conversations()
    held_out = {one.chosen for one in blocks[1].preferences("held_out")}
    assert len(held_out) >= 30
    assert not held_out & {message.content for one in made for message in one.messages}
