"""Stop expressions (``stop_regex``) that are searched in time linear in the text, whatever the expression.

SGLang's scheduler searches each answer's text behind every step with Python's ``re``, which backtracks: ``(a+)+b`` takes twice as long for
each further ``a`` and stops every request of the server. Nothing interrupts ``re``, and a clock could not decide instead: the ranks
of tensor parallelism have to agree on where an answer ends. So expressions are searched by RE2, an automaton, translated from Python's own parse so that
they mean the same; what an automaton cannot do (look-around, back-references, word boundaries) stays with ``re`` where it cannot
backtrack for long, and is refused elsewhere.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from re import _constants as sre
from re import _parser

import re2

from idlm_sglang.engine.re2_words import NotRegular, translated

# Of a request's automata together: RE2 takes one operation per byte of text, and up to that many where an automaton outgrows its memory.
MOST_STATES = 512
_MEMORY = 4 * 2**20  # bytes for each automaton
# Expressions whose automata are kept, lest each step makes them anew, in up to 50 ms: those of 32 requests with as many as SGLang takes. A request's
# states bound what they take: some 30 KB each.
_KEPT = 1024
# Steps of backtracking from one place of the text: the ways to match there times the longest of them.
MOST_STEPS = 1000
_INFINITE = float("inf")
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)


class Unsearchable(ValueError):
    """An expression whose search could take longer than the server may wait; the message says why."""


@dataclass(frozen=True)
class Searcher:
    """How one expression is searched.

    Attributes:
        found: whether a text contains a match: the answer of ``re.search(expression, text) is not None``.
        states: of its automaton, one for each character of the expression with its repeats written out; 0 where ``re`` searches.
        steps: of backtracking from one place of the text where ``re`` searches, at most; else 0.
    """

    found: Callable[[str], bool]
    states: int
    steps: float


@lru_cache(maxsize=_KEPT)
def searcher(expression: str) -> Searcher:
    """How to search for an expression.

    Raises:
        Unsearchable: it could take too long.
        re.error: Python cannot read the expression either.
    """
    search, parsed = re.compile(expression).search, _parser.parse(expression)
    try:
        automaton = re2.compile(translated(parsed, parsed.state.flags, tail=True), _options())
        if (states := _states(parsed)) <= MOST_STATES:
            return Searcher(lambda text: automaton.search(text) is not None, states, 0)
        why = f"has {states} characters, repeats written out (up to {MOST_STATES}),"
    except re2.error:
        why = "is too large"
    except NotRegular as error:
        why = f"has {error}"
    # Not a number where something without an end occurs no time at all.
    if not (steps := _ways(parsed) * _length(parsed)) <= MOST_STEPS:
        raise Unsearchable(why)
    return Searcher(lambda text: search(text) is not None, 0, steps)


def refused(expressions: Sequence[str]) -> str:
    """Why the server does not search for these, in one line, or nothing."""
    states, steps = 0, 0.0
    for expression in expressions or ():
        try:
            found = searcher(expression)
        except Unsearchable as why:
            limits = f"no look-around, back-references, \\b, atomic groups and possessive repeats, unless all of it matches in up to {MOST_STEPS} steps from one place"
            return f"stop_regex {expression!r} {why} and could be searched for without end; allowed: {limits}"
        except (re.error, RecursionError, OverflowError) as error:
            return f"stop_regex {expression!r} is not valid: {error}"
        states, steps = states + found.states, steps + found.steps
        if states > MOST_STATES:
            return f"stop_regex has {states} characters in its expressions up to {expression!r}, repeats written out; allowed: up to {MOST_STATES} in all"
        if steps > MOST_STEPS:
            return f"stop_regex takes up to {steps:.0f} steps of backtracking from one place in its expressions up to {expression!r}; allowed: up to {MOST_STEPS} in all"
    return ""


def _options() -> re2.Options:
    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, _MEMORY
    return options


def _states(parsed) -> int:
    """Characters of a regular expression, each repeat written out as often as it may or, without an end, has to occur."""
    states = 0
    for kind, value in parsed:
        if kind is sre.BRANCH:
            states += sum(_states(branch) for branch in value[1])
        elif kind in _REPEATS:
            least, most, inner = value
            states += _states(inner) * (least + 1 if most is sre.MAXREPEAT else most)
        elif kind is sre.SUBPATTERN:
            states += _states(value[3])
        else:
            states += kind is not sre.AT
    return max(states, 1)


def _ways(parsed) -> float:
    """Upper bound of the ways in which ``re`` may match ``parsed`` from one place of a text; infinite where a repeat has no end."""
    ways = 1.0
    for kind, value in parsed:
        if kind is sre.BRANCH:
            ways *= sum(_ways(branch) for branch in value[1])
        elif kind in _REPEATS:
            least, most, inner = value
            if most is sre.MAXREPEAT:
                return _INFINITE
            ways *= _repeated(_ways(inner), least, most)
        elif kind is sre.GROUPREF_EXISTS:
            ways *= sum(_ways(branch) for branch in value[1:] if branch is not None)
        else:
            ways *= _product(_ways(inner) for inner in _inner(kind, value))
    return ways


def _repeated(each: float, least: int, most: int) -> float:
    """Ways of ``least`` to ``most`` repeats of what has ``each`` ways."""
    if each in (1, _INFINITE):
        return each if each > 1 else most - least + 1
    try:
        return (each ** (most + 1) - 1) / (each - 1)
    except OverflowError:
        return _INFINITE


def _length(parsed) -> float:
    """Upper bound of the steps of one of these ways; what a back-reference repeats is counted as one."""
    length = 1.0
    for kind, value in parsed:
        if kind is sre.BRANCH:
            length += max(_length(branch) for branch in value[1])
        elif kind in _REPEATS:
            length += _INFINITE if value[1] is sre.MAXREPEAT else value[1] * _length(value[2])
        elif kind is sre.GROUPREF_EXISTS:
            length += max(_length(branch) for branch in value[1:] if branch is not None)
        else:
            length += 1 + sum(_length(inner) for inner in _inner(kind, value))
    return length


def _inner(kind, value):
    if kind is sre.SUBPATTERN:
        return [value[3]]
    if kind in (sre.ASSERT, sre.ASSERT_NOT):
        return [value[1]]
    return [value] if kind is sre.ATOMIC_GROUP else []


def _product(values) -> float:
    found = 1.0
    for value in values:
        found *= value
    return found
