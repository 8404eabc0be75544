"""One token per row in one pass: against plain torch, at any split, on the rows and columns that cause trouble."""

import pytest
import torch

from idlm_kernels.choose import choose, choose_reference
from idlm_kernels.noise import gumbel_reference
from idlm_kernels.rows import Rows
from tests.isd.reference import GREEDY, NEG, Params
from tests.kernels.common import UNTRUNCATED, assert_same_draw, packed, parameters, random_logits, rows_of

FIELDS = ("tokens", "log_p", "top", "log_sum")


def scores_of(rows: Rows, sampling) -> torch.Tensor:
    """x / T + g, without g where greedy."""
    greedy = (sampling.top_k <= 1)[:, None, None]
    x = rows.read() / torch.where(greedy, 1.0, sampling.temperature[:, None, None])
    return torch.where(greedy, x, x + gumbel_reference(sampling.seed, rows.positions, x.shape[-1])[0])


def check(rows: Rows, sampling, **options):
    got, want = choose(rows, sampling, **options), choose_reference(rows, sampling)
    near = assert_same_draw(got.tokens, want.tokens, scores_of(rows, sampling))
    same = got.tokens == want.tokens
    for name in ("log_p", "top", "log_sum"):
        torch.testing.assert_close(getattr(got, name)[same], getattr(want, name)[same], rtol=2e-6, atol=2e-6, equal_nan=True)
    return got, near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_reference_at_any_split(dtype, device):
    batch, vocab = len(UNTRUNCATED), 1_031
    logits = random_logits(batch, 5, vocab, 1, device).to(dtype)
    sampling = parameters(UNTRUNCATED, device)
    rows = rows_of(logits, torch.arange(batch, device=device) % 3, torch.arange(batch, device=device) * 100)
    one, near = check(rows, sampling, splits=1, block=256)
    print(f"{dtype}: {one.tokens.numel()} draws, {near} nearer than rounding")
    for splits in (2, 8) if dtype == torch.float32 else (4,):
        other = choose(rows, sampling, splits=splits, block=256)
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS), splits


def test_bias_and_bitmask_are_applied_on_the_fly(device):
    batch, vocab, random = len(UNTRUNCATED), 67, torch.Generator().manual_seed(2)
    logits = random_logits(batch, 3, vocab, 2, device)
    bias = (torch.randn(batch, vocab, generator=random) * 3).to(device)
    allowed = (torch.rand(batch, 3, vocab, generator=random) < 0.2).to(device)
    allowed[..., 5] = True
    counts = torch.ones(batch, dtype=torch.int64, device=device)
    rows = rows_of(logits, counts, counts, bias=bias, bitmask=packed(allowed))
    got, _ = check(rows, parameters(UNTRUNCATED, device), splits=1, block=128)
    assert bool(allowed.gather(-1, got.tokens[..., None]).all())
    assert not torch.equal(got.tokens, choose(rows_of(logits, counts, counts), parameters(UNTRUNCATED, device), splits=1, block=128).tokens)


def test_ties_go_to_the_lower_id_across_blocks_and_splits(device):
    logits = torch.zeros(2, 3, 700, device=device)
    logits[0, 0, [650, 300, 299]] = 1.0
    logits[0, 1, [699, 0]] = 2.0
    logits[0, 2, [128, 511]] = 2.0
    sampling = parameters([GREEDY, Params(temperature=1.0)], device)
    rows = rows_of(logits, torch.ones(2, dtype=torch.int64, device=device), torch.full((2,), 9, device=device))
    for splits in (1, 4):
        got, _ = check(rows, sampling, splits=splits, block=128)
        assert got.tokens[0].tolist() == [299, 0, 128]


def test_rows_with_one_token_or_none_and_far_apart_values(device):
    """-inf but for one; nothing but -inf; one far above; values that rise along the row, so that every block is better than the last."""
    vocab = 520
    logits = torch.full((2, 5, vocab), NEG, device=device)
    logits[:, 0, 517] = -300.0
    logits[:, 2] = -1000.0
    logits[:, 2, 3] = 1000.0
    logits[:, 3] = torch.arange(vocab, device=device) * 0.05
    logits[:, 4] = -torch.arange(vocab, device=device) * 0.7
    sampling = parameters([GREEDY, Params(temperature=0.5)], device)
    got, _ = check(rows_of(logits, torch.full((2,), 2, device=device), torch.full((2,), 4, device=device)), sampling, splits=2, block=128)
    assert got.tokens[:, 0].tolist() == [517, 517] and got.tokens[:, 1].tolist() == [0, 0] and got.tokens[:, 2].tolist() == [3, 3]
    assert got.log_p[1, 0] == 0 and not got.log_p[:, [0, 2, 3, 4]].isnan().any()


def test_rows_and_columns_that_are_not_read_may_hold_anything(device):
    """Padding rows, and the columns behind the vocabulary in a wider buffer."""
    vocab, batch = 301, len(UNTRUNCATED)
    clean = random_logits(batch, 5, vocab, 3, device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    sampling, seq_lens = parameters(UNTRUNCATED, device), torch.full((batch,), 50, device=device)
    wide = torch.full((batch, 5, vocab + 19), float("nan"), device=device)
    wide[..., :vocab] = clean
    wide[:, 3:] = float("nan")
    want = choose(rows_of(clean, counts, seq_lens), sampling, splits=2, block=128)
    got = choose(rows_of(wide[..., :vocab], counts, seq_lens), sampling, splits=2, block=128)
    assert all(torch.equal(getattr(got, name), getattr(want, name)) for name in FIELDS)
    assert (got.tokens[:, 3:] == 0).all() and (got.log_sum[:, 3:] == 0).all()


def test_a_row_has_the_same_bits_alone_and_in_a_batch(device):
    batch = len(UNTRUNCATED)
    logits = random_logits(batch, 3, 700, 4, device)
    counts, seq_lens = torch.ones(batch, dtype=torch.int64, device=device), torch.arange(batch, device=device)
    sampling = parameters(UNTRUNCATED, device)
    together = choose(rows_of(logits, counts, seq_lens), sampling, splits=1, block=256)
    for b in (1, 3):
        one = torch.tensor([b], device=device)
        alone = choose(rows_of(logits[b : b + 1], counts[one], seq_lens[one]), sampling.at(one), splits=2, block=256)
        assert all(torch.equal(getattr(alone, name)[0], getattr(together, name)[b]) for name in FIELDS)


def test_the_vocabulary_of_qwen3(device):
    logits = random_logits(2, 1, 151_936, 5, device)
    zero = torch.zeros(2, dtype=torch.int64, device=device)
    check(rows_of(logits, zero, zero + 7), parameters([Params(coupled=True, temperature=0.8), GREEDY], device), splits=2)


def test_offsets_beyond_32_bits(device):
    """The second request's rows begin behind element 2^31."""
    vocab, stride = 130, 2**31 + 64
    logits = torch.empty(stride + 3 * vocab, dtype=torch.bfloat16, device=device).as_strided((2, 3, vocab), (stride, vocab, 1))
    logits.copy_(random_logits(2, 3, vocab, 6, device))
    one = torch.ones(2, dtype=torch.int64, device=device)
    sampling = parameters([Params(), GREEDY], device)
    got = choose(rows_of(logits, one, one), sampling, splits=1, block=256)
    want = choose(rows_of(logits.contiguous(), one, one), sampling, splits=1, block=256)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.log_sum, want.log_sum)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(logits=torch.zeros(1, 3, 4, dtype=torch.float64)), "logits of torch.float64; allowed: float32, bfloat16"),
        (dict(index=torch.zeros(1, 2, dtype=torch.int32), positions=torch.zeros(1, 2, dtype=torch.int64)), "index of torch.int32; allowed: int64"),
        (dict(bias=torch.zeros(1, 5)), r"bias \(1, 5\) of torch.float32; allowed: \(1, 4\)"),
        (dict(logits=torch.zeros(1, 4, 3).transpose(1, 2)), "logits with stride 3 along the vocabulary; allowed: 1"),
    ],
)
def test_rows_of_the_wrong_form_are_refused(change, said):
    zero = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=said):
        Rows(**(dict(logits=torch.zeros(1, 3, 4), index=zero, positions=zero) | change))
