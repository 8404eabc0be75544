"""Which rows of a step are worth computing (ragged verify), where drafts and what is known of them are at hand on the host.

A step has up to ``2K + 1`` rows per request (:mod:`idlm_sglang.isd.layout`). A request's rows can be cut from the end:

- *behind a stop*: a draft that ends the answer, if it stands. No row behind it is read then; should it be rejected, the next step has
  fewer survivors. A MASK row that does not see the stop (a branch round) stays;
- *behind the answer's length*: what can never be committed;
- *behind doubt*: drafts that are hardly reached, all in front of them having to stand, and MASK rows behind drafts that hardly all stand.
  The MASK rows then propose again where the drafts were cut;
- *beyond the record*: MASK rows whose drafts would hardly be reached, the request's drafts standing as they did of late (:class:`Record`);
- padding behind a cold step, or a narrower one.

None of this changes an answer where a request is greedy or uses the coupled rule, whose tokens are those of the target whatever was drafted. Under
the rejection rule, which may not look at the value of a draft that is still to be tried, the caller leaves ``stops`` empty and ``sure`` at 0; a record
counts drafts that have been tried, and knows no values.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from idlm_sglang.isd.layout import BRANCH

# A draft is verified where it is reached and stands with this probability at least, as the rows that drew the drafts saw it. A MASK row is
# laid out where what it proposes is reached with the second, each MASK in front of it counting as a draft that stands as the record says. Simulated
# on the embedded checkpoint at strides 8, 12 and 16 (docs/serving.md): the optimum is flat, and hardly moves with what a row costs.
LEAST_DRAFT = math.log(0.1)
LEAST_MASK = math.log(0.2)
# How drafts stand before any was tried, and at most; the tries that this is worth; and what a round's count for when another follows.
_STANDS, _WORTH, _KEPT = 0.97, 6.0, 0.85


@dataclass(slots=True)
class Record:
    """How a request's drafts from MASK rows stood of late, when they were tried.

    Attributes:
        tried, stood: counts that fade with every round.
    """

    tried: float = 0.0
    stood: float = 0.0

    def add(self, count: int, run: int) -> None:
        """A round with ``count`` drafts, no survivors, accepted ``run`` of them; without drafts it says nothing."""
        if count == 0:
            return
        self.tried = self.tried * _KEPT + min(count, run + 1)
        self.stood = self.stood * _KEPT + run

    @property
    def stands(self) -> float:
        """Log of the probability that a draft stands where those in front of it do; below 0."""
        return math.log(min((self.stood + _STANDS * _WORTH) / (self.tried + _WORTH), _STANDS))


@dataclass(frozen=True, slots=True)
class Rows:
    """What a request brings into a step: ``1 + drafts + masks`` rows.

    Attributes:
        drafts: the drafts that are verified. masks: its MASK rows, at most K.
        doubted: there was a further draft, unlikely to be reached and to stand, of those that the round is named for.
    """

    drafts: int
    masks: int
    doubted: bool

    def __len__(self) -> int:
        return 1 + self.drafts + self.masks


def trim(drafts: Sequence[int], clean: int, sure: Sequence[float], stops: Collection[int], left: int, k: int, salvage: str, stands: float) -> Rows:
    """The rows of one request.

    Args:
        drafts: its valid drafts, at most K; the first ``clean`` are no survivors of a rejection.
        sure: log of the probability that each draft stands, given those in front of it; 0 where nothing is known.
        stops: tokens that end the answer.
        left: tokens that the request may still commit.
        k: the most drafts that it may carry next, at most K.
        salvage: ``branch``, ``chain`` or ``off``.
        stands: :attr:`Record.stands`. Where ``sure`` says nothing, the drafts in front of the MASK rows count as certain.
    """
    reached = seen = 0.0
    kept, doubted, stopped = 0, False, False
    for i in range(min(len(drafts), left - 1)):
        reached += sure[i]
        if not reached >= LEAST_DRAFT:  # a row that is not a number is no reason to go on
            # That a survivor stands first in line says nothing of drafts.
            doubted = kept > 0 or clean > 0
            break
        kept = i + 1
        if i < clean or salvage != BRANCH:
            seen = reached
        if drafts[i] in stops:
            stopped = True
            break
    fork = min(clean, kept) if salvage == BRANCH else kept
    if stopped and fork == kept:
        return Rows(kept, 0, doubted)
    # One at least where its draft may be reached: a round without any is followed by a cold one.
    worth = max(int((LEAST_MASK - seen) / stands), int(seen > LEAST_MASK))
    masks = min(k, left - 2 - fork, worth)
    return Rows(kept, max(masks, 0), doubted)
