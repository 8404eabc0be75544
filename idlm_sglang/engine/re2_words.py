"""Python's parse of a regular expression in the words of RE2, so that both find the same."""

import re
from functools import lru_cache
from re import _constants as sre
from re import _parser

_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}
_SURROGATES = (0xD800, 0xDFFF)


class NotRegular(Exception):
    """What RE2 has no word for."""


def translated(parsed, flags: int, tail: bool) -> str:
    """RE2's expression for a node of Python's parse.

    Args:
        flags: of ``re``, in force there.
        tail: nothing can be matched behind the node.

    Raises:
        NotRegular: RE2 has no word for a part of it; the message names the part.
    """
    if flags & (re.LOCALE | re.DEBUG):
        raise NotRegular("a flag for bytes")
    nodes, last = list(parsed), len(list(parsed)) - 1
    return "".join(_node(kind, value, flags, tail and i == last) for i, (kind, value) in enumerate(nodes))


def _node(kind, value, flags: int, tail: bool) -> str:
    if kind in (sre.LITERAL, sre.NOT_LITERAL):
        return f"[{'^' if kind is sre.NOT_LITERAL else ''}{_characters(value, value, flags)}]"
    if kind is sre.ANY:
        return r"[\x{0}-\x{10FFFF}]" if flags & re.DOTALL else r"[^\n]"
    if kind is sre.IN:
        return _set(value, flags)
    if kind is sre.BRANCH:
        return f"(?:{'|'.join(translated(branch, flags, tail) for branch in value[1])})"
    if kind is sre.SUBPATTERN:
        _, added, removed, inner = value
        # One of (?a), (?u), (?L) in a group is in place of that outside.
        kept = flags & ~_parser.TYPE_FLAGS if added & _parser.TYPE_FLAGS else flags
        return f"(?:{translated(inner, (kept | added) & ~removed, tail)})"
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, inner = value
        # Which of the matches is found is of no interest, so that greedy and lazy are one.
        return f"(?:{translated(inner, flags, tail=False)}){{{least},{'' if most is sre.MAXREPEAT else most}}}"
    if kind is sre.AT:
        return _place(value, flags, tail)
    raise NotRegular(_name(kind))


def _place(at, flags: int, tail: bool) -> str:
    if at is sre.AT_BEGINNING_STRING or (at is sre.AT_BEGINNING and not flags & re.MULTILINE):
        return r"\A"
    if at is sre.AT_BEGINNING:
        return "(?m:^)"
    if at is sre.AT_END_STRING:
        return r"\z"
    if at is sre.AT_END and flags & re.MULTILINE:
        return "(?m:$)"
    if at is sre.AT_END and tail:
        return r"(?:\n?\z)"
    raise NotRegular(_name(at))


def _name(constant) -> str:
    names = {"ASSERT": "look-around", "ASSERT_NOT": "look-around", "GROUPREF": "back-references", "GROUPREF_EXISTS": "back-references"}
    names |= {"AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B", "AT_END": "$ in its midst"}
    return names.get(str(constant), str(constant).lower().replace("_", " "))


def _set(items, flags: int) -> str:
    negated, found = "", []
    for kind, value in items:
        if kind is sre.NEGATE:
            negated = "^"
        elif kind is sre.LITERAL:
            found.append(_characters(value, value, flags))
        elif kind is sre.RANGE:
            found.append(_characters(*value, flags))
        elif kind is sre.CATEGORY:
            found.append(_ranges(_CATEGORIES[value], bool(flags & re.ASCII)))
        else:
            raise NotRegular(_name(kind))
    return f"[{negated}{''.join(found)}]"


def _span(first: int, last: int) -> str:
    return f"\\x{{{first:x}}}" + (f"-\\x{{{last:x}}}" if last > first else "")


def _characters(first: int, last: int, flags: int) -> str:
    """The characters of a range for a class of RE2, in all their cases where the flags say so."""
    if first <= _SURROGATES[1] and last >= _SURROGATES[0]:
        raise NotRegular("surrogates")
    if not flags & re.IGNORECASE:
        return _span(first, last)
    if last > 0x7F:
        raise NotRegular("letters beyond ASCII under (?i)")
    cases = _cases(bool(flags & re.ASCII))
    return _span(first, last) + "".join(_span(ord(c), ord(c)) for letter in range(first, last + 1) for c in cases.get(chr(letter).lower(), ""))


@lru_cache
def _everything() -> str:
    """Every character, the surrogates' places taken by NUL, which is there already."""
    return "".join(chr(c) if not _SURROGATES[0] <= c <= _SURROGATES[1] else "\0" for c in range(0x110000))


@lru_cache
def _ranges(category: str, ascii_only: bool) -> str:
    r"""What ``\w`` and the like are to Python, as ranges for a class of RE2, which counts other characters."""
    spans = (found.span() for found in re.finditer(category + "+", _everything(), re.ASCII if ascii_only else 0))
    cut = [(a, b - 1) for a, b in spans]
    return "".join(_span(a, b) for first, last in cut for a, b in _around(first, last))


def _around(first: int, last: int):
    """A range without the surrogates, of which UTF-8 has none."""
    if last < _SURROGATES[0] or first > _SURROGATES[1]:
        return [(first, last)]
    return [(a, b) for a, b in ((first, _SURROGATES[0] - 1), (_SURROGATES[1] + 1, last)) if a <= b]


@lru_cache
def _cases(ascii_only: bool) -> dict[str, str]:
    """Letter a-z -> all characters that are this letter to Python under IGNORECASE."""
    flags = re.IGNORECASE | (re.ASCII if ascii_only else 0)
    found: dict[str, str] = {}
    for c in set(re.findall("[a-z]", _everything(), flags)):
        for letter in map(chr, range(ord("a"), ord("z") + 1)):
            if re.fullmatch(letter, c, flags):
                found[letter] = found.get(letter, "") + c
    return found
