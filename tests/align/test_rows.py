"""Labels, padding and packing by hand; nothing is cut short; the order of samples follows from the seed."""

import pytest
import torch
from torch import tensor

from megachat.align.rows import cut, drawn, pack, packed, padded, that_fit
from megachat.model.cross_entropy import IGNORE as NO
from megachat.model.size import Work

SHORT = ([1, 5, 9], [0, 0, 1])
LONG = ([1, 6, 7, 8, 9], [0, 0, 1, 0, 1])


def test_a_label_is_the_next_token_where_that_one_is_trained_on():
    rows = padded([SHORT, LONG], pad=0)
    assert rows.tokens.tolist() == [[1, 5, 9, 0, 0], [1, 6, 7, 8, 9]]
    assert rows.labels.tolist() == [[NO, 9, NO, NO, NO], [NO, 7, NO, 9, NO]]
    assert rows.real.tolist() == [[True, True, True, False, False], [True] * 5]
    assert torch.equal(rows.mask, tensor([[0, 1, 0, 0, 0], [0, 1, 0, 1, 0]]).bool())


def test_padding_is_not_told_by_its_id():
    rows = padded([([1, 9], [0, 1]), LONG], pad=9)  # 9 is also a trained token
    assert rows.labels[0].tolist() == [9, NO, NO, NO, NO]
    assert rows.real[0].tolist() == [True, True, False, False, False]


def test_the_work_of_rows_is_that_of_their_real_tokens():
    rows = padded([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], pad=0)
    assert rows.work() == Work(tokens=3 + 2, pairs=(1 + 2 + 3) + (1 + 2), logits=2 + 1)


def test_packed_conversations_keep_their_labels_and_get_no_label_across_the_wall():
    out = packed([[SHORT, LONG], [LONG]], pad=0, length=9)
    assert out.tokens.tolist() == [[1, 5, 9, 1, 6, 7, 8, 9, 0], [1, 6, 7, 8, 9, 0, 0, 0, 0]]
    assert out.labels.tolist() == [
        [NO, 9, NO, NO, 7, NO, 9, NO, NO],
        [NO, 7, NO, 9, NO, NO, NO, NO, NO],
    ]
    assert out.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, -1, -1, -1, -1]]


def test_a_prompts_tokens_have_labels_too_where_they_count_for_something():
    out = packed([[SHORT, LONG]], pad=0, length=9, prompt_weight=0.25)
    assert out.labels.tolist() == [[5, 9, NO, 6, 7, 8, 9, NO, NO]]
    assert out.scale is not None
    assert out.scale.tolist() == [[0.25, 1.0, 0.0, 0.25, 1.0, 0.25, 1.0, 0.0, 0.0]]
    assert (out.trained, out.weight) == (6, 3 + 3 * 0.25)
    plain = packed([[SHORT, LONG]], pad=0, length=9)
    assert (plain.scale, plain.trained, plain.weight) == (None, 3, 3.0)


def test_what_is_cut_off_has_something_left_to_train_on(capsys: pytest.CaptureFixture[str]):
    rendered = [SHORT, LONG, ([1, 6, 7, 8, 9], [0, 0, 0, 0, 1])]
    lengths = [len(tokens) for tokens, _ in rendered]
    assert cut(range(3), lengths.__getitem__, rendered.__getitem__, 5) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert cut(range(3), lengths.__getitem__, rendered.__getitem__, 4) == [0, 1]
    said = capsys.readouterr().err
    assert "2 of 3 conversations are cut off after 4 tokens" in said
    assert "1 of them have nothing to train on before that, and are left out" in said


def test_packing_by_hand():
    assert pack([4, 3, 6, 2], 8) == [[2, 3], [0, 1]]


def test_every_item_is_packed_once_and_no_row_overflows():
    lengths = [int(n) for n in torch.randint(1, 101, (500,))]
    rows = pack(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(500))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 100
    assert len(rows) <= 1.05 * sum(lengths) / 100 + 1  # hardly more than water would take


def test_what_is_too_long_is_left_out_and_counted(capsys: pytest.CaptureFixture[str]):
    assert that_fit([3, 10, 4], lambda item: item, 9, "conversations") == [3, 4]
    assert "1 of 3 conversations are longer than 9 tokens and are left out" in capsys.readouterr().err


def test_nothing_that_fits_is_an_error_that_names_the_context():
    with pytest.raises(ValueError, match=r"none of the 2 preferences fits in 9 tokens"):
        that_fit([10, 11], lambda item: item, 9, "preferences")
    with pytest.raises(ValueError, match=r"no preferences to train on"):
        that_fit([], lambda item: item, 9, "preferences")


def test_nothing_that_fits_is_no_error_where_it_is_only_measured(capsys: pytest.CaptureFixture[str]):
    assert that_fit([10], lambda item: item, 9, "preferences", needed=False) == []
    assert "1 of 1 preferences are longer" in capsys.readouterr().err
    assert that_fit([], lambda item: item, 9, "preferences", needed=False) == []


def test_each_epoch_holds_every_sample_once_in_an_order_of_its_own():
    first, second = drawn(50, 7, range(50)), drawn(50, 7, range(50, 100))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert drawn(50, 8, range(50)) != first


def test_a_resumed_run_reads_on_where_it_stopped():
    assert drawn(7, 3, range(30)) == drawn(7, 3, range(11)) + drawn(7, 3, range(11, 30))
