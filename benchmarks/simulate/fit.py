"""The four overheads from the published points, and what they predict of points that were left out."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from scipy.optimize import least_squares

from benchmarks.simulate import roofline
from benchmarks.simulate.devices import BF16, DEVICES
from benchmarks.simulate.models import MODELS
from benchmarks.simulate.published import AR, LORA, Measured, reference
from benchmarks.simulate.roofline import Overheads, Roofline, Setup
from benchmarks.simulate.workload import Workload

LIMIT = 0.15
"""Above this mean leave-one-out error the model is not used for claims."""

_START = Overheads(context=1.0, host=2e-3, isd=2e-3, isd_request=5e-5)
_HIGHEST = Overheads(context=8.0, host=1e-2, isd=1e-2, isd_request=2e-3)


def throughput(point: Measured, overheads: Overheads) -> float:
    """Tokens per second of a published point's setting: a slot decodes an answer, and stands while anyone's prompt is prefilled.

        C x answer / (answer / TPF x decode + C x prefill)
    """
    times = Roofline([Setup(MODELS["8B"], DEVICES["H100"], point.tp, BF16)], overheads)
    load = Workload.of_context(1e3 * overheads.context)
    stride = roofline.AR if point.series == AR else point.stride
    step = times.decode(np.array([stride]), np.array([point.clients]), np.array([point.clients * load.context]))[0]
    step *= roofline.LORA if point.series == LORA else 1.0
    prefill = times.prefill(np.array([1]), np.array([load.prompt]))[0]
    return point.clients * load.answer / (load.answer / point.tokens_per_forward * step + point.clients * prefill)


def fit(points: Sequence[Measured]) -> Overheads:
    """Least squares of the logarithms of tokens per second."""
    scale, told = np.array(astuple(_HIGHEST)), np.log([p.tokens_per_second for p in points])

    def residuals(x):
        overheads = Overheads(*(x * scale))
        return np.log([throughput(p, overheads) for p in points]) - told

    found = least_squares(residuals, np.array(astuple(_START)) / scale, bounds=([0.03, 0, 0, 0], np.ones(4)))
    return Overheads(*(found.x * scale).tolist())


@dataclass(frozen=True)
class LeftOut:
    """A published point predicted by a fit without its setting. error: predicted over published, less 1; of tokens per second for AR, of the ratio to AR else."""

    point: Measured
    predicted: float
    published: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def leave_one_out(points: Sequence[Measured]) -> list[LeftOut]:
    """Every point, predicted without all points of its setting (same TP and clients): twins from another source or arm would give it away."""
    found = []
    for setting in dict.fromkeys(p.setting for p in points):
        overheads = fit([p for p in points if p.setting != setting])
        for p in (p for p in points if p.setting == setting):
            predicted, published = throughput(p, overheads), p.tokens_per_second
            if p.series != AR:
                ar = reference(p, points)
                predicted, published = predicted / throughput(ar, overheads), published / ar.tokens_per_second
            found.append(LeftOut(p, predicted, published))
    return found


@dataclass(frozen=True)
class Errors:
    """mean: of the absolute errors; worst: the largest."""

    mean: float
    worst: LeftOut

    @classmethod
    def of(cls, left_out: Sequence[LeftOut]) -> "Errors":
        return cls(float(np.mean([abs(x.error) for x in left_out])), max(left_out, key=lambda x: abs(x.error)))


def errors(left_out: Sequence[LeftOut]) -> tuple[Errors, Errors]:
    """(of AR's tokens per second, of the ratios to it)."""
    return Errors.of([x for x in left_out if x.point.series == AR]), Errors.of([x for x in left_out if x.point.series != AR])
