"""The stride controller: the model of a round, the choice, and what the controller loses while it learns."""

import copy
import math
import random

import pytest

from idlm_sglang.isd.stride import Acceptance, Policy, StepTimes, StrideController, Yields, choose, in_answers, ladder, tokens_per_round

STRIDES = ladder(8)


def linear_times(per_request: float, batches=(1, 4, 16, 64)) -> StepTimes:
    """A step costs 1 and ``per_request`` for each of its rows: small values are a device that waits for memory."""
    return StepTimes({(b, n): 1 + per_request * b * (2 * n - 1 if n > 1 else 1) for b in batches for n in STRIDES})


class Request:
    """The chain of one request, drawn: rounds of drafts, with survivors behind a rejection where ``branch`` is given."""

    def __init__(self, rng):
        self.rng, self.drafts, self.salvaged = rng, 0, False

    def _run(self, p, count):
        run = 0
        while run < count and self.rng.random() < p[min(run, len(p) - 1)]:
            run += 1
        return run

    def round(self, stride, linear, branch=None):
        """(drafts verified, accepted, of a branch); commits one more than were accepted."""
        k = stride - 1
        if k == 0:
            self.drafts, self.salvaged = 0, False
            return 0, 0, False
        if self.salvaged:
            run = self._run(branch, k)
            self.drafts, self.salvaged = k - run, False
            return k, run, True
        count = min(self.drafts, k)
        run = self._run(linear, count)
        self.drafts = k if run == count else 0
        self.salvaged = run < count and branch is not None
        return count, run, False


@pytest.mark.parametrize("p", [0.0, 0.3, 0.85, 1.0])
def test_tokens_per_round_is_the_closed_form_of_the_cold_policy(p):
    for n in range(2, 17):
        want = (2 + sum(p**i for i in range(1, n - 1))) / (2 - p ** (n - 1))
        assert tokens_per_round([p], None, n) == pytest.approx(want)
    assert tokens_per_round([p], None, 1) == 1 == tokens_per_round([p], [p], 1)
    assert tokens_per_round([], None, 4) == 1


@pytest.mark.parametrize("linear, branch", [([0.9, 0.85, 0.6], None), ([0.85], [0.5, 0.7]), ([0.6, 0.8, 0.95, 0.7], [0.9, 0.8]), ([0.2], [0.0])])
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_tokens_per_round_is_what_the_drawn_chain_gives(linear, branch, stride):
    request, rounds, committed = Request(random.Random(1)), 40_000, 0
    for _ in range(rounds):
        committed += request.round(stride, linear, branch)[1] + 1
    got, want = committed / rounds, tokens_per_round(linear, branch, stride)
    print(f"N = {stride}: {got:.3f} drawn, {want:.3f} expected")
    assert got == pytest.approx(want, rel=0.02)


def test_survivors_help_where_they_are_accepted_and_a_perfect_model_needs_none():
    assert tokens_per_round([0.85], [0.6], 4) > tokens_per_round([0.85], None, 4)
    assert tokens_per_round([1.0], [0.0], 4) == 4
    # Where nothing survives, a salvage round is a cold one.
    assert tokens_per_round([0.85], [0.0], 4) == pytest.approx(tokens_per_round([0.85], None, 4))


@pytest.mark.parametrize("p, stride, length", [(0.9, 4, 12), (0.95, 8, 25), (0.5, 4, 6), (0.97, 8, 200)])
def test_short_answers_take_the_rounds_that_drawn_ones_take(p, stride, length):
    rng, rounds, answers = random.Random(8), 0, 4000
    for _ in range(answers):
        request, left = Request(rng), length
        request.drafts = stride - 1  # drawn by the forward that ended the prompt
        while left > 0:
            left -= request.round(stride, [p])[1] + 1
            rounds += 1
    got, want = length * answers / rounds, in_answers(tokens_per_round([p], None, stride), length)
    print(f"{got:.2f} drawn, {want:.2f} expected, {tokens_per_round([p], None, stride):.2f} in the long run")
    assert want == pytest.approx(got, rel=0.06)
    assert in_answers(1.0, length) == 1 and in_answers(3.0, math.inf) == 3


def test_shorter_answers_never_widen():
    times = linear_times(0.01)
    chosen = [choose(times, [0.95], None, 16, STRIDES, length=n).stride for n in range(1, 400)]
    assert chosen == sorted(chosen) and len(set(chosen)) > 1


@pytest.mark.parametrize("branch", [None, [0.6]])
def test_the_choice_is_the_best_of_a_known_table(branch):
    for per_request in (0.0, 0.002, 0.02, 0.2):
        times = linear_times(per_request)
        for batch in (1, 3, 16, 64, 100):
            for p in (0.05, 0.5, 0.85, 0.99):
                rates = {n: tokens_per_round([p], branch, n) / times.seconds(batch, n) for n in STRIDES}
                choice = choose(times, [p], branch, batch, STRIDES)
                assert rates[choice.stride] == max(rates.values())
                assert choice.expected[1] == 1 and choice.expected[choice.stride] == pytest.approx(rates[choice.stride] / rates[1])


def test_a_model_that_accepts_nothing_and_a_tie_get_the_smaller_stride():
    flat = StepTimes({(1, n): 1.0 for n in STRIDES})
    assert choose(flat, [], None, 1, STRIDES).stride == 1
    assert choose(flat, [1.0], None, 1, STRIDES).stride == 8
    even = StepTimes({(1, n): float(n) for n in STRIDES})
    assert choose(even, [1.0], None, 1, STRIDES).stride == 1


def test_better_acceptance_never_narrows_and_more_requests_never_widen():
    for per_request in (0.001, 0.01, 0.05):
        times = linear_times(per_request)
        for batch in (1, 4, 16, 64):
            chosen = [choose(times, [p / 50], None, batch, STRIDES).stride for p in range(51)]
            assert chosen == sorted(chosen)
        chosen = [choose(times, [0.85], None, batch, STRIDES).stride for batch in range(1, 65)]
        assert chosen == sorted(chosen, reverse=True)
        assert len(set(chosen)) > 1


def test_a_stride_that_becomes_slower_is_not_chosen_for_it():
    table = {(1, n): 1 + 0.1 * n for n in STRIDES}
    before = choose(StepTimes(table), [0.85], None, 1, STRIDES).stride
    for n in STRIDES:
        slower = choose(StepTimes(table | {(1, n): 2 * table[1, n]}), [0.85], None, 1, STRIDES).stride
        assert slower == before or n == before


def test_the_current_stride_is_kept_until_another_is_better_by_the_hysteresis():
    times = StepTimes({(1, 1): 1.0, (1, 2): 1.9})  # 2 / 1.9: 5 % better at 2
    assert choose(times, [1.0], None, 1, (1, 2), current=1, hysteresis=0.06).stride == 1
    assert choose(times, [1.0], None, 1, (1, 2), current=1, hysteresis=0.05).stride == 2
    assert choose(times, [1.0], None, 1, (1, 2), current=2, hysteresis=0.06).stride == 2


def test_step_times_go_between_and_beyond_the_table():
    times = StepTimes({(1, 1): 1.0, (4, 1): 4.0, (8, 1): 6.0})
    assert [times.seconds(b, 1) for b in (1, 2, 4, 6, 8, 12)] == pytest.approx([1, 2, 4, 5, 6, 8])
    with pytest.raises(ValueError, match="every batch size"):
        StepTimes({(1, 1): 1.0, (4, 2): 1.0})


def test_step_times_are_learned_in_spite_of_outliers_and_carry_over_in_part():
    times, rng = linear_times(0.01), random.Random(2)
    before = times.seconds(6, 4)
    for _ in range(200):
        late = 20.0 if rng.random() < 0.02 else 1.0
        times.observe(6, 4, 2 * before * late * rng.uniform(0.9, 1.1))
    assert times.seconds(6, 4) == pytest.approx(2 * before, rel=0.1)
    assert 1.3 < times.seconds(6, 1) / linear_times(0.01).seconds(6, 1) < 2


def test_acceptance_is_learned_by_position_and_what_is_not_tried_follows():
    acceptance, request = Acceptance(), Request(random.Random(3))
    for _ in range(3000):
        count, run, _ = request.round(4, [0.9, 0.7, 0.5])
        acceptance.observe([count], [run])
    assert acceptance.linear() == pytest.approx([0.9, 0.7, 0.5], abs=0.07)
    for _ in range(3000):
        count, run, _ = request.round(2, [0.6])
        acceptance.observe([count], [run])
    low = acceptance.linear()
    assert low[0] == pytest.approx(0.6, abs=0.07) and low[1] < 0.5 and low[2] < 0.3
    assert Acceptance(prior=0.7).linear() == [0.7]


def test_what_rounds_commit_corrects_what_is_expected_the_most_where_it_was_seen():
    yields = Yields(ladder(16))
    assert [yields.of(n) for n in ladder(16)] == [1.0] * len(ladder(16))
    for _ in range(200):
        yields.observe(8, 16, 0.5)
    found = {n: yields.of(n) for n in ladder(16)}
    # 3 % are taken for noise.
    assert found[1] == 1 and found[8] == pytest.approx(0.5 * math.exp(0.03), rel=0.02)
    # The error grows with the stride: a narrow one hardly follows, a wider one does in part.
    assert 0.9 < found[2] <= 1 and found[2] > found[4] > found[6] > found[12] == found[16] > found[8]
    few = Yields(ladder(16))
    few.observe(8, 4, 0.5)
    assert few.of(8) == 1, "four rounds say little"
    few.observe(8, 0, 0.1)
    few.observe(1, 99, 3.0)
    assert few.of(1) == few.of(8) == 1


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_few_rounds_at_a_time_waver_and_are_not_taken_for_fewer_tokens(stride):
    """A single request, of which exactly what the chain says is true."""
    flat = StepTimes({(b, n): 1.0 for b in (1, 16) for n in ladder(16)})
    world, yields = World(flat, [0.9], 1, seed=3), Yields(ladder(16))
    factors = []
    for window in range(4000):
        told = world.tokens
        for _ in range(4):
            world.step(stride)
        yields.observe(stride, 4, (world.tokens - told) / 4 / tokens_per_round([0.9], None, stride))
        factors.append(yields.of(stride))
    mean = sum(factors[500:]) / len(factors[500:])
    print(f"stride {stride}: {mean:.3f}")
    assert mean == pytest.approx(1, abs=0.015)


def test_a_trial_does_not_move_what_is_known_of_the_stride_in_use():
    yields = Yields(ladder(16))
    for _ in range(50):
        yields.observe(8, 256, 1.0)
    yields.observe(16, 256, 0.5)
    assert yields.of(16) < 0.7 and yields.of(8) == 1


def test_what_was_seen_of_a_stride_not_in_use_is_forgotten():
    """Hard requests all day, and an easy one at night: the wide stride comes to be taken for like the one in use."""
    yields = Yields(ladder(16))
    for _ in range(50):
        yields.observe(16, 64, 0.3)
    before = yields.of(16)
    for _ in range(50):
        yields.observe(4, 4, 1.0)
    assert before < 0.33 and yields.of(16) < 0.36, "not at once"
    single = copy.deepcopy(yields)
    for _ in range(5000):
        yields.observe(4, 4, 1.0)
        single.observe(1, 4, 1.0)
    assert yields.of(16) == single.of(16) == 1


def test_the_choice_heeds_what_rounds_commit_within_what_a_round_can():
    times, yields = linear_times(0.0), Yields(STRIDES)
    plain = choose(times, [0.9], None, 1, STRIDES)
    assert plain.stride == 8 and plain.tokens[8] == pytest.approx(tokens_per_round([0.9], None, 8))
    assert plain.seconds == {n: times.seconds(1, n) for n in STRIDES}
    for _ in range(200):
        yields.observe(8, 64, 0.3)
    short = choose(times, [0.9], None, 1, STRIDES, yields=yields)
    assert short.stride < 8 and short.tokens[8] == pytest.approx(0.3 * math.exp(0.03) * plain.tokens[8], rel=0.02)
    for _ in range(400):
        yields.observe(8, 64, 100.0)
    assert choose(times, [0.9], None, 1, STRIDES, yields=yields).tokens == {n: n for n in STRIDES}
    for _ in range(400):
        yields.observe(8, 64, 0.001)
    assert choose(times, [0.9], None, 1, STRIDES, yields=yields).tokens[8] == 1


class World:
    """A server under the controller: true step times and acceptance, both noisy as drawn."""

    def __init__(self, times, linear, batch, noise=0.1, seed=4, branch=None):
        self.times, self.linear, self.branch, self.batch, self.noise = times, linear, branch, batch, noise
        self.rng = random.Random(seed)
        self.requests = [Request(self.rng) for _ in range(256)]
        self.seconds, self.tokens = 0.0, 0

    def step(self, stride):
        rounds = [r.round(stride, self.linear, self.branch) for r in self.requests[: self.batch]]
        seconds = self.times.seconds(self.batch, stride) * math.exp(self.rng.gauss(0, self.noise))
        self.seconds += seconds
        self.tokens += sum(run + 1 for _, run, _ in rounds)
        return seconds, rounds

    def rate(self, stride):
        """Expected tokens per second of a fixed stride."""
        return self.batch * tokens_per_round(self.linear, self.branch, stride) / self.times.seconds(self.batch, stride)


def serve(controller, world, steps):
    """Let the controller decide; the strides used, step by step."""
    used = []
    for step in range(steps):
        if step % controller.policy.interval == 0:
            stride = controller.decide(world.batch)
        before = world.tokens
        seconds, rounds = world.step(stride)
        controller.observe_step(world.batch, stride, seconds)
        controller.observe_tokens(stride, world.tokens - before, len(rounds))
        for salvaged in (False, True):
            part = [(c, r) for c, r, s in rounds if s is salvaged]
            controller.observe_rounds([c for c, _ in part], [r for _, r in part], salvaged)
        used.append(stride)
    return used


# True times per row, times the controller starts with, acceptance, requests.
LASTING = [
    (0.002, 0.002, [0.9], 1),
    (0.002, 0.05, [0.9, 0.8, 0.7], 1),
    (0.05, 0.002, [0.85], 16),
    (0.05, 0.002, [0.1], 4),
    (0.02, 0.02, [0.85, 0.8, 0.75, 0.7, 0.65], 8),
    (0.2, 0.2, [0.99], 64),
    (0.01, 0.01, [0.5], 16),
    (0.0, 0.5, [0.3], 1),
]


@pytest.mark.parametrize("true, assumed, linear, batch", LASTING)
@pytest.mark.parametrize("salvage", [False, True])
def test_under_lasting_conditions_little_is_lost_against_the_best_fixed_stride(true, assumed, linear, batch, salvage):
    branch = [0.7 * p for p in linear] if salvage else None
    world = World(linear_times(true), linear, batch, branch=branch)
    controller = StrideController(linear_times(assumed), STRIDES, salvage)
    serve(controller, world, 400)
    world.seconds = world.tokens = 0
    used = serve(controller, world, 3000)
    best = max(STRIDES, key=world.rate)
    got = world.tokens / world.seconds
    changes = sum(a != b for a, b in zip(used, used[1:]))
    print(f"best {best}, mostly {max(STRIDES, key=used.count)}, {got / world.rate(best):.3f} of its rate, {got / world.rate(1):.3f} of AR, {changes} changes")
    bound = controller.policy.explore + controller.policy.hysteresis
    noise = 0.015
    assert got > world.rate(best) * (1 - bound - noise)
    assert got > world.rate(1) * (1 - bound - noise)


def test_a_single_request_comes_to_the_best_stride_within_a_hundred_steps():
    world = World(linear_times(0.002), [0.95, 0.9], 1)
    controller = StrideController(linear_times(0.1), STRIDES)
    serve(controller, world, 100)
    used = serve(controller, world, 100)
    best = max(STRIDES, key=world.rate)
    assert all(world.rate(n) > 0.9 * world.rate(best) for n in set(used)), used


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_a_model_that_accepts_nothing_is_left_at_one_token_per_step(p):
    world = World(linear_times(0.02), [p], 8)
    controller = StrideController(linear_times(0.02), STRIDES)
    used = serve(controller, world, 6000)
    assert used[200:].count(1) > 0.97 * len(used[200:])
    # It still looks: acceptance that comes back is found.
    world.linear = [0.95]
    back = serve(controller, world, 6000)
    assert back[-1] == max(STRIDES, key=world.rate) or 1 not in back[-100:]


def test_on_changing_conditions_the_loss_stays_bounded():
    """Every 1500 steps another load, another text, another speed of the machine."""
    rng = random.Random(5)
    lost = []
    for seed in range(3):
        world = World(linear_times(0.01), [0.9], 1, seed=seed)
        controller = StrideController(linear_times(0.01), STRIDES)
        tokens = {n: 0.0 for n in STRIDES}
        for _ in range(12):
            world.times = linear_times(rng.choice([0.002, 0.01, 0.05]))
            world.linear = [rng.choice([0.1, 0.5, 0.85, 0.97])]
            world.batch = rng.choice([1, 4, 16, 64])
            start = world.seconds
            serve(controller, world, 1500)
            for n in STRIDES:
                tokens[n] += world.rate(n) * (world.seconds - start)
        lost.append(1 - world.tokens / max(tokens.values()))
        print(f"against the best fixed stride {lost[-1]:+.3f}, against AR {1 - world.tokens / tokens[1]:+.3f}")
        assert world.tokens > 0.97 * tokens[1]
    assert max(lost) < 0.03


def test_two_strides_that_are_equally_good_are_not_swapped_all_the_time():
    rates = {n: tokens_per_round([0.8], None, n) for n in STRIDES}
    even = StepTimes({(b, n): rates[n] * (1 + 0.01 * (n != 2)) for b in (1, 64) for n in STRIDES})
    world = World(even, [0.8], 4, noise=0.15)
    used = serve(StrideController(even, STRIDES, policy=Policy(explore=0.0)), world, 8000)
    changes = sum(a != b for a, b in zip(used[400:], used[401:]))
    print(f"{changes} changes in {len(used) - 400} steps")
    assert changes < 0.02 * len(used)


def test_trying_costs_no_more_than_was_saved_for_it():
    """From the first step on: nothing is accepted, so that every step but one of stride 1 is a loss."""
    world = World(linear_times(0.02), [0.0], 8, noise=0.0)
    controller = StrideController(linear_times(0.02), STRIDES, policy=Policy(patience=100))
    first = serve(controller, world, 40)[0]
    policy, single = controller.policy, world.times.seconds(8, 1)
    begun_with = policy.credit * world.times.seconds(8, first) / single
    world.seconds = 0.0
    for steps in range(400, 20_001, 400):
        serve(controller, world, 400)
        lost = world.seconds / single - steps
        assert lost <= begun_with + policy.explore * world.seconds / single, steps
    assert lost > 0, "nothing was tried"


def test_a_trial_that_costs_more_than_a_server_begins_with_is_saved_up_for():
    """Eight tokens in the time of four, where the table said eight; what one step accepts nobody knows yet."""
    true = {(8, n): 1.0 + 3.0 * (n - 1) / 7 for n in STRIDES}
    assumed = StepTimes(true | {(8, n): 8.0 for n in (6, 8)})
    world = World(StepTimes(true), [0.99], 8)
    controller = StrideController(assumed, STRIDES)
    one = controller.policy.interval * controller.policy.trial * (8.0 - 1.0)
    assert one > controller.policy.credit * true[8, 4]
    used = serve(controller, world, 8000)
    assert used[-1] == max(STRIDES, key=world.rate) == 8


def test_equal_observations_give_equal_decisions():
    runs = [serve(StrideController(linear_times(0.01), STRIDES), World(linear_times(0.03), [0.8], 4, seed=6), 1000) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1


class Unlike(World):
    """Requests of two kinds, half of them easy to draft for, in answers of 160 tokens."""

    kinds = ([0.97], [0.2])

    def __init__(self, times, batch, noise=0.1, seed=4):
        super().__init__(times, [], batch, noise, seed)
        self.requests = [self._new() for _ in range(batch)]

    def _new(self):
        request = Request(self.rng)
        request.p, request.left = self.rng.choice(self.kinds), 160
        return request

    def step(self, stride):
        rounds = []
        for i, request in enumerate(self.requests):
            count, run, salvaged = request.round(stride, request.p, [0.7 * p for p in request.p])
            rounds.append((count, run, salvaged))
            self.tokens += min(run + 1, request.left)
            request.left -= run + 1
            if request.left <= 0:
                self.requests[i] = self._new()
        seconds = self.times.seconds(self.batch, stride) * math.exp(self.rng.gauss(0, self.noise))
        self.seconds += seconds
        return seconds, rounds


def test_easy_requests_among_hard_ones_do_not_widen_the_stride_of_all():
    """The chain takes all requests for alike, and expects up to twice of the widest stride what it gives."""
    strides = ladder(16)
    table = {(b, n): (0.4 + 0.6 * b / 16) * t for b in (1, 4, 16) for n, t in zip(strides, (5.0, 6.0, 6.6, 7.2, 8.4, 9.5, 11.4, 13.0))}
    times = StepTimes(table)

    def rate(world):
        return world.tokens / world.seconds

    true = {}
    for n in strides:
        world = Unlike(times, 16, noise=0.0)
        for _ in range(2000):
            world.step(n)
        true[n] = rate(world)
    best = max(true, key=true.get)
    found = {True: [], False: []}
    for seed in range(4):
        for told in found:
            world, controller = Unlike(times, 16, seed=seed), StrideController(StepTimes(table), strides, True)
            if not told:
                controller.observe_tokens = lambda *_: None
            serve(controller, world, 600)
            world.seconds = world.tokens = 0
            serve(controller, world, 3000)
            found[told].append(rate(world) / true[best])
    means = {told: sum(shares) / len(shares) for told, shares in found.items()}
    print(f"best {best}, {true[best] / true[1]:.2f} of AR; {means[True]:.3f} of its rate, {means[False]:.3f} where rounds are not looked at")
    assert true[16] < true[1]
    assert means[True] > 0.88 and means[True] > means[False] + 0.04


def test_a_small_gain_is_looked_into():
    """Stride 1 became faster than it is thought to be, which only a look at it tells."""
    assumed = {(b, n): t for b in (1, 16) for n, t in zip(STRIDES, (1.0, 1.35, 1.7, 2.0, 2.7, 3.4))}
    true = {(b, n): t * (0.8 if n == 1 else 1) for (b, n), t in assumed.items()}

    def steps_until_single(doubt):
        world = World(StepTimes(assumed), [0.7], 16, noise=0.03)
        controller = StrideController(StepTimes(assumed), STRIDES, policy=Policy(doubt=doubt))
        assert 1 not in serve(controller, world, 1000)[-100:]
        world.times = StepTimes(true)
        used = serve(controller, world, 6000)
        return next((i for i in range(len(used) - 20) if set(used[i : i + 20]) == {1}), len(used))

    soon, late = steps_until_single(Policy.doubt), steps_until_single(0.0)
    print(f"{soon} steps, {late} without doubt")
    assert soon < 1200 and soon < late / 2
