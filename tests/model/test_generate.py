"""Writing: greedy against a loop without a cache, sampling against distributions worked out by hand."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from megachat.model.generate import Request, Sampling, Writer, generate, stream, truncate, write
from tests.model.test_gpt import in_transformers, some_tokens, tiny

GREEDY = Sampling(temperature=0, top_k=0, top_p=1, max_new_tokens=12)
FREE = Sampling(temperature=1, top_k=0, top_p=1, max_new_tokens=12)
PROMPTS = [some_tokens(n, seed=n).tolist() for n in (7, 1, 12, 4)]


class Wrapped(nn.Module):
    """Like a DeepSpeed engine: a model's forward without its other methods. Notes the rows of each call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.batches: list[int] = []

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.batches.append(inputs[0].shape[0])
        return self.module(*inputs, **named)


def written_without_cache(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_writing_of_a_ragged_batch_equals_a_loop_over_single_prompts_without_a_cache() -> None:
    model = tiny(tied=False)
    expected = [written_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 5  # or the test would show little
    assert generate(model, PROMPTS, GREEDY, stop=set()) == expected
    assert generate(Wrapped(model), PROMPTS, GREEDY, stop=set(), pad=3) == expected


def test_a_row_ends_with_its_stop_token_and_the_others_go_on() -> None:
    model = tiny(tied=False)
    whole = generate(model, PROMPTS, GREEDY, stop=set())
    stop = {whole[0][2], whole[2][5]}
    expected = []
    for row in whole:
        ends = [i for i, token in enumerate(row) if token in stop]
        expected.append(row[: ends[0] + 1] if ends else row)
    assert sorted(map(len, expected))[0] < 12
    assert generate(model, PROMPTS, GREEDY, stop=stop) == expected


def test_stopped_rows_leave_the_batch_once_they_are_half_of_it() -> None:
    class Countdown(nn.Module):
        """After n comes n - 1."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, tokens: Tensor, cache: Any) -> Tensor:
            return nn.functional.one_hot((tokens - 1).clamp(min=0), 10).float()

    model = Wrapped(Countdown())
    answers = generate(model, [[1], [2], [3], [6]], GREEDY, stop={0})
    assert answers == [[0], [1, 0], [2, 1, 0], [5, 4, 3, 2, 1, 0]]
    assert model.batches == [4, 4, 2, 1, 1, 1]


def test_a_rank_that_has_finished_goes_along_until_all_have() -> None:
    model = Wrapped(tiny(tied=False))
    first = generate(model, PROMPTS, GREEDY, stop=set())
    model.batches, said = [], []

    def synced(finished: bool) -> bool:
        said.append(finished)
        return len(said) == 9  # the slowest rank stops at its ninth token

    answers = generate(model, PROMPTS, GREEDY, stop={row[0] for row in first}, synced=synced)
    assert answers == [row[:1] for row in first]
    assert said == [True] * 9
    assert model.batches == [4] + [1] * 8


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (2, 1.0, [0, 4 / 7, 0, 3 / 7]),
        (0, 0.6, [0, 4 / 7, 0, 3 / 7]),  # 0.4 does not reach 0.6; 0.4 + 0.3 does
        (0, 0.35, [0, 1.0, 0, 0]),  # the token that reaches it stays, though it goes beyond
        (0, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),
        (3, 0.75, [0, 4 / 7, 0, 3 / 7]),  # of the top three alone, 0.4 + 0.3 are 7/9 > 0.75
        (1, 0.75, [0, 1.0, 0, 0]),
        (9, 1.0, [0.1, 0.4, 0.2, 0.3]),  # more than there are
    ],
)
def test_truncation_keeps_the_distribution_worked_out_by_hand(
    top_k: int, top_p: float, kept: list[float]
) -> None:
    logits = tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert_close(truncate(logits, top_k, top_p).softmax(-1), tensor([kept]))


def test_each_row_is_truncated_for_itself() -> None:
    logits = tensor([[0.6, 0.4], [0.1, 0.9]]).log()
    assert_close(truncate(logits, 1, 1.0).isfinite(), tensor([[True, False], [False, True]]))


def test_of_equal_logits_exactly_top_k_stay() -> None:
    assert truncate(torch.zeros(1, 5), 2, 1.0).isfinite().tolist() == [[True, True, False, False, False]]


def test_samples_have_the_frequencies_of_the_tempered_truncated_distribution() -> None:
    logits = tensor([0.64, 0.32, 0.04]).log().expand(40_000, 3)
    chosen = FREE.model_copy(update={"temperature": 2.0, "top_k": 2}).choose(logits, range(40_000), 3)
    # At temperature 2 the weights are roots: 0.8 and 0.4 sqrt 2; 40,000 draws have a deviation of 0.0025.
    assert (chosen == 0).float().mean().item() == pytest.approx(0.8 / (0.8 + 0.4 * 2**0.5), abs=0.01)
    assert (chosen == 2).sum() == 0


def test_temperature_zero_takes_the_likeliest() -> None:
    assert GREEDY.choose(tensor([[0.1, 0.3, 0.2], [3.0, 1.0, 2.0]])).tolist() == [1, 0]


def test_the_seeds_decide_everything_and_rows_are_drawn_apart() -> None:
    model = tiny(tied=False)
    first, second, third = (
        generate(model, [PROMPTS[0]] * 16, FREE, set(), range(first, first + 16)) for first in (1, 1, 2)
    )
    assert first == second
    assert first[1:] == third[:-1]
    assert len({row[0] for row in first}) > 1
    assert len({tuple(row) for row in first}) == 16


def test_a_row_is_written_alike_whatever_it_is_written_with() -> None:
    model = tiny(tied=False)
    seeds = [11, 22, 33, 44]
    whole = generate(model, PROMPTS, FREE, set(), seeds)
    assert [generate(model, [p], FREE, set(), [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)] == whole
    # Also where others stop and are dropped from the batch.
    stop = {whole[0][1], whole[1][2], whole[2][3]}
    cut = [next((i + 1 for i, token in enumerate(row) if token in stop), 12) for row in whole]
    assert len(set(cut)) > 2
    assert generate(model, PROMPTS, FREE, stop, seeds) == [
        row[:end] for row, end in zip(whole, cut, strict=True)
    ]


def test_streaming_gives_what_generating_gives_as_it_is_written() -> None:
    model = tiny(tied=False).train()
    whole = generate(model, PROMPTS[:1], FREE, set(), [1])[0]
    streamed = stream(model, PROMPTS[0], FREE, set(), 1)
    assert list(islice(streamed, 5)) == whole[:5]
    streamed.close()  # type: ignore[attr-defined]
    assert model.training  # as it was, even after half an answer


def test_on_token_hears_of_every_token_row_by_row() -> None:
    heard: list[tuple[int, int]] = []
    answers = generate(
        tiny(tied=False), PROMPTS[:2], GREEDY, set(), on_token=lambda row, token: heard.append((row, token))
    )
    assert heard == [pair for a, b in zip(*answers, strict=True) for pair in ((0, a), (1, b))]


def test_dropout_is_off_while_writing() -> None:
    model = tiny(tied=False, dropout=0.5).train()
    assert generate(model, PROMPTS, GREEDY, set()) == generate(model, PROMPTS, GREEDY, set())
    assert model.training


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused() -> None:
    prompt = some_tokens(60).tolist()
    with pytest.raises(ValueError, match="71 tokens is longer than the model's context=64"):
        generate(tiny(), [prompt], GREEDY, set())
    assert (
        len(generate(tiny(), [prompt[:53]], GREEDY, set())[0]) == 12
    )  # 53 + 12 - 1 places: the last is not read


def alone(model: nn.Module, request: Request) -> list[int]:
    """The answer to one request by itself."""
    return [written.token for written in write(model, [request])]


REQUESTS = [
    Request(
        some_tokens(length, seed=length).tolist(),
        Sampling(temperature=temperature, top_k=top_k, top_p=1, max_new_tokens=limit),
        stop={limit},
        seed=length,
    )
    for length, temperature, top_k, limit in [
        (7, 1.0, 0, 12), (1, 0.0, 0, 5), (12, 1.0, 0, 12), (4, 2.0, 3, 20), (9, 1.0, 0, 1), (3, 1.0, 0, 8)
    ]
]  # fmt: skip
"""Each with its own settings, stop token, and limit."""


@pytest.mark.parametrize("slots", [1, 2, 4, 6])
def test_requests_of_all_kinds_share_slots_and_get_what_they_would_get_alone(slots: int) -> None:
    model = tiny(tied=False)
    answers: list[list[int]] = [[] for _ in REQUESTS]
    for written in write(model, REQUESTS, slots):
        answers[written.request].append(written.token)
        request = REQUESTS[written.request]
        full = len(answers[written.request]) == request.sampling.max_new_tokens
        assert written.last == (full or written.token in request.stop)
    assert answers == [alone(model, request) for request in REQUESTS]
    assert {len(answer) for answer in answers} > {1, 5}


def test_a_slot_is_taken_again_as_soon_as_it_is_free() -> None:
    model = Wrapped(tiny(tied=False))
    requests = [
        Request([7, 8], GREEDY.model_copy(update={"max_new_tokens": limit}), set())
        for limit in (2, 9, 2, 2, 3)
    ]
    assert len([*write(model, requests, slots=2)]) == 18
    # Reading a prompt chooses a token, too. Two and two prompts, and the third to fifth when one has ended:
    # 9 tokens of the second beside 2 + 2 + 2 + 3 of the others, of which each has a pass of its own for its
    # prompt, in which the second waits.
    assert model.batches == [2, 2, 1, 2, 1, 2, 1, 2, 2, 1, 1, 1]


def test_requests_may_be_added_and_cancelled_while_others_are_written() -> None:
    model = tiny(tied=False)
    expected = [alone(model, request) for request in REQUESTS]
    writer = Writer(model, slots=2, capacity=40)
    first, second, waiting = (writer.add(request) for request in (REQUESTS[0], REQUESTS[2], REQUESTS[1]))
    written = writer.step() + writer.step()
    assert [one.request for one in written] == [first, second] * 2
    writer.cancel(first)
    writer.cancel(waiting)
    writer.cancel(first)  # once more is no mistake: it may have ended meanwhile
    third = writer.add(REQUESTS[3])
    while not writer.idle:
        written += writer.step()
    answers = {number: [one.token for one in written if one.request == number] for number in range(4)}
    assert answers == {first: expected[0][:2], second: expected[2], waiting: [], third: expected[3]}


@pytest.mark.parametrize("slots", [1, 3])
def test_log_probabilities_are_the_models_at_the_sampling_temperature(slots: int) -> None:
    model = tiny(tied=False)
    tokens = [[*request.prompt] for request in REQUESTS]
    found: list[list[float]] = [[] for _ in REQUESTS]
    for written in write(model, REQUESTS, slots):
        tokens[written.request].append(written.token)
        found[written.request].append(written.logp)
    for request, text, logps in zip(REQUESTS, tokens, found, strict=True):
        logits = model(tensor([text]))[0, len(request.prompt) - 1 : -1].detach()
        # Among all tokens, whatever top_k leaves; greedily, at 1.
        chosen = (logits / (request.sampling.temperature or 1)).log_softmax(-1)
        assert_close(
            tensor(logps),
            chosen.gather(1, tensor(text)[len(request.prompt) :, None])[:, 0],
            rtol=0,
            atol=1e-5,
        )


def test_a_request_that_no_slot_has_room_for_says_how_much_there_is() -> None:
    writer = Writer(tiny(), slots=1, capacity=20)
    writer.add(Request([1] * 9, GREEDY, set()))  # 9 + 12 - 1: the last token is not read
    with pytest.raises(
        ValueError, match=r"10 tokens and max_new_tokens=12 need room for 21 tokens, and .* 20"
    ):
        writer.add(Request([1] * 10, GREEDY, set()))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_greedy_answers_are_those_of_transformers(qk_norm: bool) -> None:
    model = tiny(tied=False, qk_norm=qk_norm)
    other = in_transformers(model)
    longest = max(map(len, PROMPTS))
    padded = tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    real = tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    theirs = other.generate(padded, attention_mask=real, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert generate(model, PROMPTS, GREEDY, set()) == theirs[:, longest:].tolist()
