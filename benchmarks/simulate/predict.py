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
from benchmarks.simulate.loop import Fixed, Load, Outcome, run
from benchmarks.simulate.models import MODELS
from benchmarks.simulate.roofline import AR, Overheads, Roofline, Setup
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
    """What is assumed of an ISD step's cost over AR's.

    Attributes:
        host: the cost that was fitted on the published server, or none.
        single: the measured cost of stride 1 as its SECONDS, as its SHARE of AR's step, or FREE.
        whole: simulate every arm, or the controller with cold rounds alone.
    """

    name: str
    host: bool
    single: str
    whole: bool = False

    def times(self, setups: list[Setup], overheads: Overheads, single: Single) -> Roofline:
        fitted = overheads if self.host else replace(overheads, isd=0.0, isd_request=0.0)
        seconds = single.seconds if self.single == SECONDS else 0.0
        return Roofline(setups, fitted, seconds, 1 / (1 - single.share) - 1 if self.single == SHARE else 0.0)


SECONDS, SHARE, FREE = "seconds", "share", "free"
BASE = Scenario("published host cost; N = 1 cost in ms", host=True, single=SECONDS, whole=True)
SCENARIOS = (
    BASE,
    Scenario("published host cost; N = 1 cost as a share", host=True, single=SHARE),
    Scenario("published host cost; N = 1 free", host=True, single=FREE),
    Scenario("no host cost beyond AR's; N = 1 cost in ms", host=False, single=SECONDS),
)


@dataclass(frozen=True)
class Predicted:
    """One arm of one set-up at one concurrency, as predictions.csv has it.

    Attributes:
        setup: its name, made of model, dtype, device, TP.
        running: requests at a time: clients, or fewer where the KV cache holds no more; the others wait, in AR as well.
        arm: "AR", "N=4" or "controller". salvage: 1, or 0 for cold rounds behind rejections.
        steady, total: tokens per second, see `loop.Outcome`; steady_ratio, total_ratio: over AR's.
        per_round: tokens per request and decode step.
        changes: of the controller's stride.
        used: share of the requests' rounds by stride, "N:share" by falling share.
    """

    scenario: str
    setup: str
    clients: int
    running: int
    arm: str
    salvage: int
    steady: float
    total: float
    per_round: float
    steady_ratio: float
    total_ratio: float
    changes: int
    used: str


def setups() -> list[Setup]:
    return [Setup(model, device, tp, dtype) for model, dtype, device, tp in product(MODELS.values(), DTYPES, DEVICES.values(), TPS)]


def predict(overheads: Overheads, single: Single, clients: Sequence[int] = CLIENTS, seed: int = 0, waves: int = 3, warm: bool = False, say: Callable[[str], None] = print) -> list[Predicted]:
    """Every set-up at every concurrency in every scenario; waves: answers for each slot behind the first, warm: see `loop.run`."""
    found = []
    for c in clients:
        for scenario in SCENARIOS:
            found += list(_scenario(scenario, overheads, single, c, seed, waves, warm))
        say(f"{c} clients")
    return found


def _scenario(scenario: Scenario, overheads: Overheads, single: Single, clients: int, seed: int, waves: int, warm: bool) -> Iterator[Predicted]:
    served = setups()
    workload = Workload.of_context(1e3 * overheads.context)
    slots = np.array([min(clients, s.capacity(workload.context)) for s in served])
    load = Load.busy(workload, slots, waves=max(waves, 8 // clients), seed=seed)
    times = scenario.times(served, overheads, single)
    parts = [times.pick(i) for i in range(len(served))]
    ar = run(times, Fixed(AR), COLD, load, seed)

    def rows(name: str, acceptance: Acceptance, policy: Fixed | Controlled, got: Outcome) -> Iterator[Predicted]:
        changes = policy.changes if isinstance(policy, Controlled) else np.zeros(len(served), int)
        for i, s in enumerate(served):
            used = sorted(((float(u[i]), n) for n, u in got.used.items() if u[i] >= 0.005), reverse=True)
            yield Predicted(scenario.name, s.name, clients, int(slots[i]), name, int(acceptance.branch is not None), float(got.steady[i]), float(got.total[i]), float(got.per_round[i]),
                            float(got.steady[i] / ar.steady[i]), float(got.total[i] / ar.total[i]), int(changes[i]), " ".join(f"{n}:{u:.2f}" for u, n in used))  # fmt: skip

    def arm(name: str, acceptance: Acceptance, policy: Fixed | Controlled) -> Iterator[Predicted]:
        return rows(name, acceptance, policy, run(times, policy, acceptance, load, seed, warm))

    yield from rows("AR", COLD, Fixed(AR), ar)
    for acceptance in (COLD, SALVAGE) if scenario.whole else (COLD,):
        salvage = acceptance.branch is not None
        if scenario.whole:
            for n in FIXED if salvage else (1, *FIXED):
                yield from arm(f"N={n}", acceptance, Fixed(n))
        yield from arm(CONTROLLER, acceptance, Controlled(parts, slots, salvage, seed=seed))


def pick(rows: Sequence[Predicted], arm: str, scenario: Scenario = BASE, salvage: int = 0) -> list[Predicted]:
    """One arm's rows in one scenario."""
    return [r for r in rows if (r.scenario, r.arm, r.salvage) == (scenario.name, arm, salvage)]
