"""The noise: uniform, independent along every axis of its key, and the same bits in any batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from idlm_sglang.isd import noise
from tests.isd.reference import counts_p

M = 0xFFFFFFFF
STREAMS = (noise.STREAM_TOKEN, noise.STREAM_ACCEPT, noise.STREAM_FINAL)
SEEDS = [0, 1, 2, -1, 42, 2**31, 2**32 - 1, 2**32, 2**53 + 1, -(2**31), 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def gumbel_to_unit(g: torch.Tensor) -> np.ndarray:
    """The uniform behind a Gumbel value: small where the noise is large."""
    return -np.expm1(-np.exp(-g.double().numpy().ravel()))


def uniformity(values: np.ndarray) -> dict[str, float]:
    """p-values of KS, of 256 equal bins, and of the 8 bits behind the first 10."""
    bins = np.bincount((values * 256).astype(int), minlength=256)
    fine = np.bincount((values * 2**18).astype(np.int64) % 256, minlength=256)
    return {
        "ks": float(stats.kstest(values, "uniform").pvalue),
        "bins": counts_p(bins.astype(float), np.full(256, values.size / 256)),
        "fine": counts_p(fine.astype(float), np.full(256, values.size / 256)),
    }


def pair_p(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """p-values of the correlation and of a 16 x 16 table of two uniform samples."""
    cells = np.bincount((a * 16).astype(int) * 16 + (b * 16).astype(int), minlength=256)
    r = np.corrcoef(a, b)[0, 1]
    return float(2 * stats.norm.sf(abs(r) * np.sqrt(a.size))), counts_p(cells.astype(float), np.full(256, a.size / 256))


def mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M
    return x ^ (x >> 16)


def bits(seed: int, position: int, stream: int, token: int | None) -> int:
    """The hash on unbounded integers; ``token`` None is the row's acceptance draw."""
    low, high, place = seed & M, (seed >> 32) & M, (position * 4 + stream) & M
    first = mix(mix(low ^ 0x9E3779B9) ^ mix(place))
    second = mix((mix(high ^ 0x85EBCA6B) + mix(place ^ 0xC2B2AE35)) & M)
    first, second = mix(first ^ second), mix((second + low * 0x27D4EB2F) & M)
    if token is None:
        return mix(first ^ second)
    return mix(mix((token * 0x9E3779B1) & M ^ first) ^ second)


def test_noise_is_the_documented_hash_for_any_64_bit_seed():
    """Against unbounded integers, so that a product that leaves int64 shows; also pins seeded text across versions."""
    positions = torch.tensor([[0, 1, 2, 31, 40_959]]).expand(len(SEEDS), -1)
    seeds = torch.tensor(SEEDS)
    for stream in STREAMS:
        u = noise.uniform(seeds, positions, stream)
        unit = gumbel_to_unit(noise.gumbel(seeds, positions, 7, stream)).reshape(len(SEEDS), 5, 7)
        for i, seed in enumerate(SEEDS):
            for j, position in enumerate(positions[0].tolist()):
                assert abs(float(u[i, j]) - (bits(seed, position, stream, None) + 0.5) / 2**32) < 1e-7
                for token in range(7):
                    assert abs(unit[i, j, token] - (bits(seed, position, stream, token) + 0.5) / 2**32) < 1e-6


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("axis", ["positions", "seeds", "large seeds"])
def test_acceptance_draws_are_uniform(axis, stream):
    n = 200_000
    if axis == "positions":
        u = noise.uniform(torch.tensor([-5]), torch.arange(n)[None], stream)
    elif axis == "seeds":
        u = noise.uniform(torch.arange(n) - n // 2, torch.full((n, 1), 17), stream)
    else:
        u = noise.uniform(torch.arange(n) * 2**40 - 2**62, torch.full((n, 1), 17), stream)
    p = uniformity(u.double().numpy().ravel())
    print(axis, stream, n, p)
    assert min(p.values()) > 1e-3


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds", "large seeds"])
def test_token_noise_is_gumbel(axis):
    n = 151_936
    if axis == "tokens":
        g = noise.gumbel(torch.tensor([2**63 - 1]), torch.tensor([[3]]), n)
    elif axis == "positions":
        g = noise.gumbel(torch.tensor([-1]), torch.arange(n)[None], 2)[..., 1]
    elif axis == "seeds":
        g = noise.gumbel(torch.arange(n) - n // 2, torch.full((n, 1), 9), 2)[..., 1]
    else:
        g = noise.gumbel(torch.arange(n) * 2**32, torch.full((n, 1), 9), 2)[..., 1]
    p = uniformity(gumbel_to_unit(g))
    print(axis, n, p)
    assert min(p.values()) > 1e-3


def test_rare_noise_is_as_rare_as_it_should_be():
    """Both tails in powers of four: large noise decides whether unlikely tokens appear at all."""
    g = noise.gumbel(torch.arange(2_000), torch.zeros(2_000, 1, dtype=torch.int64), 3_000)
    unit = gumbel_to_unit(g)
    edges = np.concatenate([[0], 4.0 ** -np.arange(11, 0, -1), 1 - 4.0 ** -np.arange(1, 11), [1]])
    observed = np.histogram(unit, edges)[0].astype(float)
    p = counts_p(observed, np.diff(edges) * unit.size)
    # Equal large values would fall to the lower id: there the noise must be finer than float32 is near 1.
    large = g.ravel().topk(unit.size // 10_000).values
    distinct = len(large.unique()) / len(large)
    print(f"{unit.size} draws, tails to 4^-11: p = {p:.3f}; of the {len(large)} largest {distinct:.1%} are distinct")
    assert p > 1e-3 and distinct > 0.97


PAIRS = {
    "tokens": lambda s, p: (noise.gumbel(s, p, 33)[..., :-1], noise.gumbel(s, p, 33)[..., 1:]),
    "tokens 2^10 apart": lambda s, p: (
        noise.gumbel(s[:40], p[:40], 1056)[..., :32],
        noise.gumbel(s[:40], p[:40], 1056)[..., 1024:],
    ),
    "positions": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(s, p + 1, 32)),
    "positions 2^14 apart": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(s, p + 2**14, 32)),
    "position against token": lambda s, p: (noise.gumbel(s, p, 33)[..., 1:], noise.gumbel(s, p + 1, 33)[..., :-1]),
    "draft against final": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(s, p, 32, noise.STREAM_FINAL)),
    "final against next draft": lambda s, p: (noise.gumbel(s, p, 32, noise.STREAM_FINAL), noise.gumbel(s, p + 1, 32)),
    "draft against acceptance": lambda s, p: (noise.gumbel(s, p, 1)[..., 0], noise.uniform(s, p)),
    "acceptance against final": lambda s, p: (noise.uniform(s, p), noise.gumbel(s, p, 1, noise.STREAM_FINAL)[..., 0]),
    "acceptance of neighbours": lambda s, p: (noise.uniform(s, p), noise.uniform(s, p + 1)),
    "seed + 1": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(s + 1, p, 32)),
    "seed + 1 against position": lambda s, p: (noise.gumbel(s + 1, p, 32), noise.gumbel(s, p + 1, 32)),
    "seed and its negative": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(-s - 1, p, 32)),
    "seed << 32": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(s << 32, p, 32)),
    "seed, top bit flipped": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(s ^ -(2**63), p, 32)),
    "seed, bit 32 flipped": lambda s, p: (noise.gumbel(s, p, 32), noise.gumbel(s ^ 2**32, p, 32)),
    "acceptance of seed + 1": lambda s, p: (noise.uniform(s, p), noise.uniform(s + 1, p)),
    "acceptance of seed << 32": lambda s, p: (noise.uniform(s, p), noise.uniform(s << 32, p)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_neighbours_are_independent(name):
    if "draft against acc" in name or "acceptance" in name:
        seeds, positions = torch.arange(1, 1_001), torch.arange(160).repeat(1_000, 1)
    else:
        seeds, positions = torch.arange(1, 126), torch.arange(40).repeat(125, 1)
    a, b = PAIRS[name](seeds, positions)
    as_unit = [x.double().numpy().ravel() if x.min() > 0 and x.max() < 1 else gumbel_to_unit(x) for x in (a, b)]
    correlation, table = pair_p(*as_unit)
    print(f"{name}: {a.numel()} pairs, p = {correlation:.3f} (correlation), {table:.3f} (table)")
    assert min(correlation, table) > 1e-3


def test_acceptance_sums_over_one_request_are_as_spread_as_independent_draws():
    """Weak dependence among the many draws of one request shows in the variance of their sum."""
    u = noise.uniform(torch.arange(4_000), torch.arange(256).repeat(4_000, 1)).double()
    z = (u.sum(1) - 128) / np.sqrt(256 / 12)
    p = float(stats.kstest(z.numpy(), "norm").pvalue)
    print(f"4000 sums of 256 draws: p = {p:.3f}, standard deviation {float(z.std()):.4f}")
    assert p > 1e-3


@pytest.mark.parametrize("vocab", [5, 51, 1003])
def test_bits_do_not_depend_on_the_batch(vocab):
    """Odd vocabularies, so that a row's place in memory changes with the batch."""
    random = torch.Generator().manual_seed(vocab)
    seeds = torch.randint(-(2**62), 2**62, (13,), generator=random)
    positions = torch.randint(0, 40_000, (13, 5), generator=random)
    for stream in STREAMS:
        g, u = noise.gumbel(seeds, positions, vocab, stream), noise.uniform(seeds, positions, stream)
        order = torch.randperm(13, generator=random)
        assert torch.equal(noise.gumbel(seeds[order], positions[order], vocab, stream), g[order])
        assert torch.equal(noise.gumbel(seeds, positions.flip(1), vocab, stream), g.flip(1))
        assert torch.equal(noise.gumbel(seeds, positions, vocab + 3, stream)[..., :vocab], g)
        assert torch.equal(noise.gumbel(seeds, positions.to(torch.int32), vocab, stream), g)
        for row in range(13):
            alone = slice(row, row + 1)
            for column in range(5):
                cell = positions[alone, column : column + 1]
                assert torch.equal(noise.gumbel(seeds[alone], cell, vocab, stream)[0, 0], g[row, column])
                assert torch.equal(noise.uniform(seeds[alone], cell, stream)[0, 0], u[row, column])


def test_different_seeds_positions_and_streams_give_different_noise():
    seeds = sorted(
        {
            s
            for seed in (1, 7, 123_456_789)
            for s in (seed, seed + 1, -seed, seed << 32, seed ^ -(2**63), (seed << 32) + seed)
        }
    )
    positions = torch.tensor([[0, 1, 2, 3]]).expand(len(seeds), -1)
    draws = torch.stack([noise.gumbel(torch.tensor(seeds), positions, 4, stream) for stream in STREAMS])
    rows = {tuple(row) for row in draws.reshape(-1, 4).tolist()}
    assert len(rows) == len(STREAMS) * len(seeds) * 4


def test_noise_is_finite_at_the_ends_of_the_hash():
    ends = torch.tensor([0, 1, 2**23, 2**24 - 1, 2**31, 2**32 - 2**7, 2**32 - 2, 2**32 - 1])
    u = noise._unit(ends)
    assert (u > 0).all() and (u < 1).all() and (u.diff() >= 0).all()
    g = -torch.log(-torch.log1p(-u))
    assert torch.isfinite(g).all() and float(g[0]) == pytest.approx(33 * np.log(2), rel=1e-5)


def test_gumbel_max_draws_follow_p_down_to_tiny_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.0489, 1e-3, 9e-5, 1e-5, 0.0])
    n = 1_000_000
    drawn = torch.cat(
        [
            (p.log() + noise.gumbel(torch.arange(start, start + n // 10), torch.full((n // 10, 1), 5), 8)).argmax(-1)
            for start in range(0, n, n // 10)
        ]
    )
    observed = torch.bincount(drawn.ravel(), minlength=8).numpy().astype(float)
    value = counts_p(observed, p.double().numpy() / float(p.double().sum()) * n)
    print(f"{n} draws: {observed.astype(int).tolist()}, p = {value:.3f}")
    assert value > 1e-3 and observed[6] > 0


def test_gumbel_max_over_a_large_vocabulary():
    vocab, rows, block = 151_936, 96, 4_096
    g = noise.gumbel(torch.arange(rows), torch.full((rows, 1), 1_000), vocab)[:, 0]
    assert torch.isfinite(g).all()
    one_hot = torch.full((rows, vocab), float("-inf"))
    wanted = torch.arange(rows) * 1_571
    one_hot.scatter_(1, wanted[:, None], 0.0)
    assert torch.equal((one_hot + g).argmax(1), wanted)
    ids = g.argmax(1).double().numpy() / vocab
    whole = float(stats.kstest(ids, "uniform").pvalue)
    # Each block of ids is a uniform draw of its own: many more draws from the same noise.
    blocks = vocab // block
    winners = g[:, : blocks * block].view(rows, blocks, block).argmax(-1).ravel()
    within = counts_p(np.bincount(winners.numpy() // 64, minlength=64).astype(float), np.full(64, winners.numel() / 64))
    # The winner of the uniform case has E[max g] = log V + 0.5772.
    mean = float(g.max(1).values.double().mean())
    print(
        f"{rows} uniform draws from {vocab}: p = {whole:.3f}; {winners.numel()} from {block}: p = {within:.3f}; mean maximum {mean:.3f}"
    )
    assert whole > 1e-3 and within > 1e-3
    assert abs(mean - (np.log(vocab) + 0.57722)) < 4 * np.pi / np.sqrt(6 * rows)


def test_the_keys_of_a_cpu_are_those_of_any_device():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 7**20])
    positions = torch.tensor([[0, 1, 2**30]], dtype=torch.int32).expand(6, -1)
    for stream in (noise.STREAM_TOKEN, noise.STREAM_FINAL):
        here = noise._row_keys_on_host(seeds, positions, stream)
        anywhere = noise._row_keys(seeds, positions, stream)
        assert all(torch.equal(torch.from_numpy(a.astype(np.int64)), b) for a, b in zip(here, anywhere))


def test_noise_made_ahead_is_the_noise():
    """Requests that go on, repeat a position, jump, join and leave, and a mixture whose members move differently."""
    ahead, moves = noise.NoiseAhead(), 0
    batch = {seed: 100 + seed for seed in range(3)}
    for step in range(60):
        if step in (5, 30):
            batch[step] = step
        if step in (20, 45):
            del batch[min(batch)]
        batch = {seed: p + (1 if step % 13 else (0, 3, 1 + seed)[step % 3]) for seed, p in batch.items()}
        seeds, positions = torch.tensor(list(batch)), torch.tensor(list(batch.values()), dtype=torch.int32)
        assert torch.equal(ahead.of(seeds, positions, 40), noise.gumbel(seeds, positions[:, None], 40))
        moves += ahead._noise.shape[1] > 1
    assert moves > 30, "most steps find their noise made"


@pytest.mark.parametrize("vocab", [7, 1_003])
def test_noise_made_in_blocks_is_noise_made_at_once(vocab, monkeypatch):
    seeds, positions = torch.tensor([5, -3, 2**60]), torch.arange(12).view(3, 4)
    whole = noise.gumbel(seeds, positions, vocab)
    for rows in (1, 5, 12):
        monkeypatch.setattr(noise, "BLOCK", rows * vocab + vocab // 2)
        assert torch.equal(noise.gumbel(seeds, positions, vocab), whole)
    assert torch.equal(torch.cat([noise.gumbel(seeds[i : i + 1], positions[i : i + 1], vocab) for i in range(3)]), whole)
    assert noise.gumbel(seeds, positions[:, :0], vocab).shape == (3, 0, vocab)
