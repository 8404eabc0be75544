"""Tests of whether two samples of answers come from one distribution."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from scipy.stats import chi2_contingency

# Of both samples together: below it a cell is pooled with others, so that ten are expected of each of two equal samples.
LEAST_IN_CELL = 20


def two_sample(left: Sequence, right: Sequence, view: Callable[[object], Hashable] = lambda sample: sample) -> tuple[float, int]:
    """(p, cells) of a two-sample chi-square on ``view`` of each sample, rare cells pooled; p is 1 where one cell is left."""
    a, b = Counter(map(view, left)), Counter(map(view, right))
    cells = sorted(set(a) | set(b), key=lambda cell: -(a[cell] + b[cell]))
    table, rest = [], [0, 0]
    for cell in cells:
        if a[cell] + b[cell] >= LEAST_IN_CELL:
            table.append((a[cell], b[cell]))
        else:
            rest = [rest[0] + a[cell], rest[1] + b[cell]]
    if sum(rest) >= LEAST_IN_CELL:
        table.append(tuple(rest))
    if len(table) < 2:
        return 1.0, len(table)
    return float(chi2_contingency(table, correction=False).pvalue), len(table)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in order: the chance of any below alpha, all hypotheses true, is at most alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        found[i] = largest
    return found
