"""Penalties of every row against plain loops over the tokens in front of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from idlm_sglang.isd.layout import drafts_in_front
from idlm_sglang.isd.penalties import PenaltyRows, penalise

VOCAB = 12


def penalty_rows(frequency, presence, repetition, min_new, ends) -> PenaltyRows:
    width = max(map(len, ends), default=0)
    return PenaltyRows(
        frequency=torch.tensor(frequency),
        presence=torch.tensor(presence),
        repetition=torch.tensor(repetition),
        min_new=torch.tensor(min_new),
        end_tokens=torch.tensor([[*e, *[e[-1] if e else 0] * (width - len(e))] for e in ends], dtype=torch.int64).view(len(ends), width),
        any_repetition=any(r != 1 for r in repetition),
        any_min_new=any(m > 0 for m in min_new),
    )


def in_loops(logits, frequency, presence, repetition, min_new, ends, output):
    """The next token's penalised logits of one request whose output so far is ``output``."""
    logits = logits.astype(np.float64).copy()
    for token in range(VOCAB):
        n = output.count(token)
        logits[token] -= frequency * n + presence * (n > 0)
    if len(output) < min_new:
        logits[list(ends)] = -np.inf
    for token in set(output):
        logits[token] *= repetition if logits[token] < 0 else 1 / repetition
    return logits


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=9)
request = st.tuples(
    st.sampled_from([0.0, 0.4, -0.3]),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([1.0, 1.3, 0.7]),
    st.integers(0, 8),
    st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=3),
    tokens,
    st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3),
    st.integers(0, 3),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(request, min_size=1, max_size=4), st.integers(0, 2**31))
def test_row_i_counts_the_history_and_drafts_1_to_i(requests, seed):
    frequency, presence, repetition, min_new, ends, outputs, drafts, valid = zip(*requests)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(requests), 7, VOCAB, generator=generator) * 3
    rows = penalty_rows(frequency, presence, repetition, min_new, [sorted(e) for e in ends])
    counts = torch.stack([torch.bincount(torch.tensor(o, dtype=torch.int64), minlength=VOCAB) for o in outputs]).to(torch.int32)
    got = penalise(
        logits.clone(),
        rows,
        counts,
        torch.tensor(drafts),
        drafts_in_front(torch.tensor(valid), torch.tensor(valid), 3, 7),
        torch.tensor([len(o) for o in outputs]),
    )
    for b in range(len(requests)):
        for i in range(7):
            # Behind the drafts a row's own output is longer than what is known of it: only its length counts.
            known = list(outputs[b]) + list(drafts[b][: min(i, valid[b])])
            early = len(outputs[b]) + i < min_new[b]
            want = in_loops(logits[b, i].numpy(), frequency[b], presence[b], repetition[b], 10**9 if early else 0, ends[b], known)
            np.testing.assert_allclose(got[b, i].numpy(), want, rtol=1e-5, atol=1e-5, err_msg=f"request {b}, row {i}")


def test_a_stale_count_is_noticed(monkeypatch):
    """With no draft counted the comparison above fails."""
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: real(a, b) * 0)
    with pytest.raises(AssertionError):
        test_row_i_counts_the_history_and_drafts_1_to_i()


def test_neutral_penalties_change_no_bit():
    logits = torch.randn(2, 5, VOCAB)
    rows = penalty_rows([0.0, 0.0], [0.0, 0.0], [1.0, 1.3], [0, 0], [[], []])
    counts = torch.zeros(2, VOCAB, dtype=torch.int32)
    out = penalise(logits, rows, counts, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 5, 2, dtype=torch.bool), torch.tensor([0, 0]))
    assert torch.equal(out, logits)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_penalties_never_ask_for_a_value(device):
    with FakeTensorMode():
        one = torch.empty(3, device=device)
        ints = lambda *shape: torch.empty(shape, dtype=torch.int64, device=device)
        rows = PenaltyRows(one, one, one, ints(3), ints(3, 2), True, True)
        in_front = torch.empty(3, 7, 3, dtype=torch.bool, device=device)
        out = penalise(torch.empty(3, 7, VOCAB, device=device), rows, ints(3, VOCAB), ints(3, 3), in_front, ints(3))
    assert out.shape == (3, 7, VOCAB) and out.device.type == device
