"""Rows that are left out of a step: the text stays AR's, what is read was computed, and fewer rows do the work."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idlm_sglang.isd import BRANCH, CHAIN, OFF, isd_step
from idlm_sglang.isd import decode as decoding
from idlm_sglang.isd.decode import decode, one_row
from idlm_sglang.isd.tables import StepTables
from idlm_sglang.isd.trim import LEAST_DRAFT, LEAST_MASK, Record, Rows, trim
from tests.isd.reference import Tabular

PLENTY = 1000
STOP = 7
NEW = Record().stands


def test_a_step_without_stops_doubts_and_ends_is_computed_whole():
    assert trim([1, 2, 3], 3, [0.0] * 3, {STOP}, PLENTY, 3, BRANCH, NEW) == Rows(3, 3, False)
    assert len(trim([1, 2, 3], 3, [0.0] * 3, {STOP}, PLENTY, 3, BRANCH, NEW)) == 7
    assert len(trim([], 0, [0.0] * 3, {STOP}, PLENTY, 3, BRANCH, NEW)) == 4, "a cold step has no padding"


def test_behind_a_stop_nothing_is_read():
    assert trim([1, STOP, 3], 3, [0.0] * 3, {STOP}, PLENTY, 3, BRANCH, NEW) == Rows(2, 0, False)
    assert trim([1, STOP, 3], 3, [0.0] * 3, (), PLENTY, 3, BRANCH, NEW) == Rows(3, 3, False)
    # The MASK rows of a branch do not see its survivors, nor a stop among them.
    assert trim([1, STOP, 3], 0, [0.0] * 3, {STOP}, PLENTY, 3, BRANCH, NEW) == Rows(2, 3, False)
    assert trim([1, STOP, 3], 0, [0.0] * 3, {STOP}, PLENTY, 3, CHAIN, NEW) == Rows(2, 0, False)


def test_what_can_never_be_committed_has_no_row():
    # With m tokens left, m - 1 drafts and the token behind them; MASK rows for tokens that a later step would verify.
    found = [trim([1, 2, 3], 3, [0.0] * 3, (), left, 3, BRANCH, NEW) for left in (0, 1, 2, 3, 4, 5, 6, 8)]
    assert [(rows.drafts, rows.masks) for rows in found] == [(0, 0), (0, 0), (1, 0), (2, 0), (3, 0), (3, 0), (3, 1), (3, 3)]
    assert [(r.drafts, r.masks) for r in (trim([], 0, [0.0] * 3, (), left, 3, BRANCH, NEW) for left in (1, 2, 3, 4))] == [(0, 0), (0, 0), (0, 1), (0, 2)]


def test_doubt_ends_the_drafts_and_the_masks_behind_them():
    half = math.log(0.5)
    assert trim([1] * 6, 6, [half] * 6, (), PLENTY, 6, BRANCH, NEW) == Rows(3, 0, True), "0.125 is above 0.1, and no MASK is worth its row behind it"
    assert trim([1] * 6, 6, [half] * 2 + [0.0] * 4, (), PLENTY, 6, BRANCH, NEW) == Rows(6, 6, False)
    # A branch's MASK rows stake nothing on survivors, however doubtful these are.
    assert trim([1] * 6, 0, [half] * 6, (), PLENTY, 6, BRANCH, NEW) == Rows(3, 6, True)
    assert trim([1] * 3, 0, [-9.0] * 3, (), PLENTY, 3, BRANCH, NEW) == Rows(0, 3, False), "and says nothing of the drafts of other rounds"
    assert trim([1] * 3, 3, [-9.0] * 3, (), PLENTY, 3, BRANCH, NEW) == Rows(0, 3, True)
    assert LEAST_DRAFT < LEAST_MASK < 0
    assert trim([1] * 6, 6, [0.0, math.nan, 0.0, 0.0, 0.0, 0.0], (), PLENTY, 6, BRANCH, NEW) == Rows(1, 6, True), "logits of a broken model, or none allowed"


def test_a_request_whose_drafts_fall_brings_fewer_mask_rows():
    masks = lambda record, k=15: trim([], 0, [], (), PLENTY, k, BRANCH, record.stands).masks
    record = Record()
    assert masks(record) == 15
    wide = []
    for _ in range(12):
        record.add(4, 1)  # one stands, the second falls
        wide.append(masks(record))
    assert wide == sorted(wide, reverse=True) and wide[-1] == 3, wide
    # What is reached half as often as not is worth a row; a fifth is not.
    assert math.exp(record.stands) ** 3 > math.exp(LEAST_MASK) > math.exp(record.stands) ** 4
    for _ in range(60):
        record.add(3, 0)
    assert masks(record) == 2, "with no draft at all it would never be known better"
    for _ in range(40):
        record.add(masks(record), masks(record))
    assert masks(record) == 15, "a text that becomes easy widens it again"
    before = record.stands
    record.add(0, 0)
    assert record.stands == before, "a cold round says nothing"


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=40))
def test_a_record_says_a_probability(rounds):
    record = Record()
    for count, run in rounds:
        record.add(count, min(run, count))
    assert math.log(0.4) < record.stands <= NEW < 0


def test_hard_text_brings_fewer_rows_by_its_record(model, monkeypatch):
    """What the record leaves out costs some rounds, and is worth it where a row takes a tenth of a round's own time."""
    blind = property(lambda record: NEW)
    found = {}
    for name in ("record", "blind"):
        if name == "blind":
            monkeypatch.setattr(Record, "stands", blind)
        answers = [decode(model, model.prompt, 16, model.mask, one_row(temperature=0.8, seed=s, coupled=True), 60, trims=True, salvage=BRANCH) for s in range(12)]
        found[name] = sum(a.rows for a in answers), sum(a.forwards for a in answers)
    print(found)
    work = {name: forwards + 0.1 * rows for name, (rows, forwards) in found.items()}
    assert found["record"][0] < 0.85 * found["blind"][0] and work["record"] < 0.95 * work["blind"]


_KINDS = st.sampled_from([OFF, BRANCH, CHAIN])


@given(
    st.lists(st.integers(0, 9), max_size=7),
    st.booleans(),
    st.lists(st.floats(-3, 0), min_size=7, max_size=7),
    st.integers(1, 20),
    _KINDS,
    st.floats(math.log(0.4), NEW),
)
def test_rows_fit_the_step_and_the_answer(drafts, survivors, sure, left, salvage, stands):
    clean, k = 0 if survivors else len(drafts), 7
    rows = trim(drafts, clean, sure, {STOP}, left, k, salvage, stands)
    assert 0 <= rows.drafts <= min(len(drafts), left - 1) and 0 <= rows.masks <= k and 1 <= len(rows) <= 2 * k + 1
    assert STOP not in drafts[: max(rows.drafts - 1, 0)]
    if not rows.doubted and STOP not in drafts and (clean or rows.drafts):
        assert rows.drafts == min(len(drafts), left - 1)


@pytest.fixture(scope="module")
def model():
    return Tabular(37, order=2, seed=7, context=0.15, spread=1.8)


@pytest.mark.parametrize("salvage", [OFF, BRANCH, CHAIN])
@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "coupled": True}])
def test_the_text_is_that_of_ar_with_fewer_rows(model, settings, stride, salvage):
    """What is not computed is NaN here: who verified by it would not give AR's text."""
    rows = computed = 0
    for seed in range(8):
        one, stops = one_row(**settings, seed=seed), frozenset({(5 * seed + 3) % 37})
        for length, ends in ((40, frozenset()), (40, stops), (9 + seed, stops)):
            wanted = decode(model, model.prompt, 1, model.mask, one, length, ends)
            whole = decode(model, model.prompt, stride, model.mask, one, length, ends, salvage)
            trimmed = decode(model, model.prompt, stride, model.mask, one, length, ends, salvage, trims=True)
            assert trimmed.tokens == whole.tokens == wanted.tokens
            assert math.isfinite(trimmed.introspection)
            rows, computed = rows + whole.rows, computed + trimmed.rows
    print(f"N = {stride}, {salvage}: {computed} rows of {rows}")
    assert computed < rows


def test_a_row_that_is_read_all_the_same_is_noticed(model, monkeypatch):
    """A step that proposes drafts from MASK rows that were not computed gives another count of them."""
    k = 3
    logits = torch.randn(1, 2 * k + 1, 11)
    drafts = logits[:, :k].argmax(-1)
    whole, three = torch.tensor([k]), torch.tensor([k])
    step = lambda masks: isd_step(logits, drafts, three, torch.zeros(1, k), None, whole, torch.tensor([4]), one_row(), tables=StepTables(k, "cpu"), masks=masks)
    assert [int(step(m).proposal.counts) for m in (None, *(torch.tensor([m]) for m in (3, 2, 0)))] == [3, 3, 2, 0]
    assert int(step(None).accept_lens) == k + 1 and step(None).proposal.sure is None
    sure, rows = step(torch.tensor([3])).proposal.sure, logits[0, k + 1 :]
    assert torch.allclose(sure[0], rows.log_softmax(-1).amax(-1))


def test_the_rejection_rule_never_hears_of_stops(model, monkeypatch):
    """Nor of doubt: which drafts are tried must not depend on their values. What it may leave out is what no answer is long enough for, and MASK rows by
    the record, which does not come to that here."""
    one, told = one_row(temperature=1.0, seed=3), []
    exact = decoding.trim
    monkeypatch.setattr(decoding, "trim", lambda drafts, clean, sure, stops, *rest: told.append((stops, sure)) or exact(drafts, clean, sure, stops, *rest))
    for rows, hears in ((one, False), (one_row(temperature=1.0, seed=3, coupled=True), True)):
        told.clear()
        decode(model, model.prompt, 4, model.mask, rows, 60, frozenset({3}), trims=True)
        assert told and all(bool(stops) == hears and not any(sure) for stops, sure in told)
    whole, trimmed = (decode(model, model.prompt, 4, model.mask, one, 30, trims=t) for t in (False, True))
    assert trimmed.tokens == whole.tokens and trimmed.rows < whole.rows
