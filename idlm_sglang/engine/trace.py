"""How each token of an answer came, for requests that ask: ``custom_params: {"idlm_trace": true}``."""

from dataclasses import dataclass, field

# Kinds of a forward, beside those of engine.metrics (verify, salvage, cold, single).
PREFILL = "prefill"

TRACE_PARAM = "idlm_trace"
# The key in ``meta_info``; also how new forwards travel to the HTTP process.
TRACE = "idlm_trace"


@dataclass
class Trace:
    """The forwards of one answer, in order, as ``[tokens, kind, drafts, accepted]``.

    ``tokens`` is what the forward added to the answer, behind stops and limits; in a ``verify`` or ``salvage`` forward the first ``accepted`` of
    them are its accepted drafts (survivors of a rejection in ``salvage``), and the one behind them, where it is kept, is the
    bonus if all ``drafts`` were accepted, else the correction. A ``prefill`` forward adds one token: an answer's first, and
    those behind a retraction or from a batch that mixes decode rows into prefill.

    Attributes:
        forwards: as above.
        tokens: of all of them together.
        told: how many were sent on.
    """

    forwards: list[list] = field(default_factory=list)
    tokens: int = 0
    told: int = 0

    def add(self, start: int, tokens: int, kind: str, drafts: int, accepted: int) -> None:
        """A decode forward whose first token is the answer's number ``start``, from 0."""
        self._prefills(start)
        self.forwards.append([tokens, kind, drafts, accepted])
        self.tokens += tokens

    def new(self, length: int) -> list[list]:
        """Forwards that were not sent on yet, for an answer of ``length`` tokens so far."""
        self._prefills(length)
        found = self.forwards[self.told :]
        self.told = len(self.forwards)
        return found

    def _prefills(self, length: int) -> None:
        # No decode step brought these tokens.
        while self.tokens < length:
            self.forwards.append([1, PREFILL, 0, 0])
            self.tokens += 1


def trace_of(req) -> Trace | None:
    """The trace of a request that asked for one, so far; it outlives a retraction."""
    plan = getattr(req, "idlm_plan", None)
    if plan is None or not plan.trace:
        return None
    found = getattr(req, "idlm_trace", None)
    if found is None:
        found = req.idlm_trace = Trace()
    return found


def collected(state, new: list[list]) -> list[list]:
    """The whole trace in the HTTP process, whose ``state`` of the request keeps what has come before."""
    found = getattr(state, "idlm_trace", None)
    if found is None:
        found = state.idlm_trace = []
    found.extend(new)
    # A copy: answers of a stream that wait for a slow client stay what they were.
    return list(found)
