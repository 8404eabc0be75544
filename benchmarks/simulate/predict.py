"""All set-ups through the closed loop: every arm on the same requests, and its ratio to AR."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks.simulate import published
from benchmarks.simulate.bench_results import Single
from benchmarks.simulate.chain import Acceptance
from benchmarks.simulate.controlled import Controlled
from benchmarks.simulate.devices import DEVICES, DTYPES
from benchmarks.simulate.loop import AR, Fixed, Load, Outcome, run
from benchmarks.simulate.models import MODELS
from benchmarks.simulate.roofline import Overheads, Roofline, Setup
from benchmarks.simulate.workload import Workload

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FIXED = (2, 3, 4, 8)
TPS = (1, 4)

COLD = Acceptance((published.ACCEPTANCE,))
# A survivor's acceptance that gives the gains of salvage in trials on a small model with linear acceptance 0.92: 3.11 -> 3.17 and 4.56 -> 4.79
# tokens per forward at N = 4 and 8. Not known for the 8B.
SALVAGE = replace(COLD, branch=(0.59,))

CONTROLLER = "controller"


@dataclass(frozen=True)
class Scenario:
    """What is assumed of an ISD step's costs over AR's: the fitted ones or none, and of the measured cost of stride 1, its seconds or its share of AR's step."""

    name: str
    host: bool
    share: bool

    def times(self, setups: list[Setup], overheads: Overheads, single: Single) -> Roofline:
        fitted = overheads if self.host else replace(overheads, isd=0.0, isd_request=0.0)
        return Roofline(setups, fitted, **({"single_share": 1 / (1 - single.share) - 1} if self.share else {"single": single.seconds}))


BASE = Scenario("published host cost, N = 1 cost in ms", host=True, share=False)
SCENARIOS = (
    BASE,
    Scenario("published host cost, N = 1 cost as a share", host=True, share=True),
    Scenario("no host cost beyond AR's, N = 1 cost in ms", host=False, share=False),
    Scenario("no host cost beyond AR's, N = 1 cost as a share", host=False, share=True),
)


@dataclass(frozen=True)
class Predicted:
    """One arm of one set-up at one concurrency.

    Attributes:
        running: requests at a time: clients, or fewer where the KV cache holds no more; the others wait, in AR as well.
        arm: "AR", "N=4" or "controller"; salvage: or cold rounds behind rejections.
        steady, total: tokens per second, see `loop.Outcome`; steady_ratio, total_ratio: over AR's.
        changes: of the controller's stride, per 1000 steps... of the whole load.
        used: share of the requests' rounds by stride.
    """

    scenario: str
    setup: Setup
    clients: int
    running: int
    arm: str
    salvage: bool
    steady: float
    total: float
    per_round: float
    steady_ratio: float
    total_ratio: float
    changes: int
    used: dict[int, float]


def setups() -> list[Setup]:
    return [Setup(model, device, tp, dtype) for model, dtype, device, tp in product(MODELS.values(), DTYPES, DEVICES.values(), TPS)]


def predict(overheads: Overheads, single: Single, clients: Sequence[int] = CLIENTS, seed: int = 0, say: Callable[[str], None] = print) -> list[Predicted]:
    """Every arm in the first scenario; AR, stride 1 and the controllers in the others."""
    found = []
    for c in clients:
        for scenario in SCENARIOS:
            found += list(_scenario(scenario, overheads, single, c, seed))
        say(f"{c} clients")
    return found


def _scenario(scenario: Scenario, overheads: Overheads, single: Single, clients: int, seed: int) -> Iterator[Predicted]:
    served = setups()
    workload = Workload.of_context(1e3 * overheads.context)
    slots = np.array([min(clients, s.capacity(workload.context)) for s in served])
    load = Load.busy(workload, slots, waves=max(3, 16 // clients), seed=seed)
    times = scenario.times(served, overheads, single)
    ar = run(times, Fixed(AR), COLD, load, seed)

    def arm(name: str, policy, acceptance: Acceptance) -> Iterator[Predicted]:
        got = ar if name == "AR" else run(times, policy, acceptance, load, seed)
        changes = getattr(policy, "changes", np.zeros(len(served), int))
        for i, s in enumerate(served):
            yield _row(scenario, s, clients, int(slots[i]), name, acceptance.branch is not None, got, ar, i, int(changes[i]))

    yield from arm("AR", Fixed(AR), COLD)
    yield from arm("N=1", Fixed(1), COLD)
    for acceptance in (COLD, SALVAGE):
        if scenario == BASE:
            for n in FIXED:
                yield from arm(f"N={n}", Fixed(n), acceptance)
        parts = [times.pick(i) for i in range(len(served))]
        yield from arm(CONTROLLER, Controlled(parts, slots, acceptance.branch is not None, seed=seed), acceptance)


def _row(scenario: Scenario, setup: Setup, clients: int, running: int, name: str, salvage: bool, got: Outcome, ar: Outcome, i: int, changes: int) -> Predicted:
    return Predicted(scenario.name, setup, clients, running, name, salvage, float(got.steady[i]), float(got.total[i]), float(got.per_round[i]),
                     float(got.steady[i] / ar.steady[i]), float(got.total[i] / ar.total[i]), changes, {n: float(u[i]) for n, u in got.used.items() if u[i] > 0})  # fmt: skip


def controlled(rows: Sequence[Predicted], scenario: str, salvage: bool = False) -> list[Predicted]:
    """The controller's rows of one scenario."""
    return [r for r in rows if r.scenario == scenario and r.arm == CONTROLLER and r.salvage == salvage]
