"""Stop expressions mean what they mean to Python, and none is searched for without end."""

import os
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_sglang.engine.stops import MOST_STATES, MOST_STEPS, refused, searcher

EVERYTHING = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)
# Some that Python and RE2 count differently, or whose cases are several.
CHARACTERS = "ab1 _\n.-Kkſsİıßé٣Ⅷ\x1c\u2028\u00a0字😀"
ATOMS = st.sampled_from([*"ab1k", "é", "字", r"\.", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[^a]", r"[\w.-]", r"[^\s\d]", "[a-k]", "^", "$", r"\A", r"\Z", r"\b", "😀"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "+?", "{2,}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(["?=", "?!", "?<!", "?i:", "?s:", "?>", "?a:", "?u:"]), inner).map(lambda pair: f"({pair[0]}{pair[1]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=int(os.environ.get("STOP_EXPRESSIONS") or 800), deadline=None, derandomize=True)
@given(st.sampled_from(["", "(?i)", "(?m)", "(?s)", "(?a)", "(?im)"]), EXPRESSIONS, st.text(CHARACTERS, max_size=8))
def test_what_is_searched_for_is_found_where_python_finds_it(flags, expression, text):
    expression = flags + expression
    try:
        pattern = re.compile(expression)
    except re.error:
        assert "is not valid" in refused([expression])
        return
    if not refused([expression]):
        found = searcher(expression)
        # Python's search skips places by a set of letters that it makes under the outer flags alone: it finds no (?a:\W) in ß, where a match from there does.
        wanted = any(pattern.match(text, at) for at in range(len(text) + 1)) if found.states else pattern.search(text) is not None
        assert found.found(text) == wanted


@pytest.mark.parametrize("category", [r"\w", r"\d", r"\s", r"\W", r"\D", r"\S", r"[^\w\s]", "(?i:k)", "(?i:[a-z])", "(?i:[^s])", ".", "(?a:\\w)"])
def test_every_character_is_what_it_is_to_python(category):
    found = searcher(category)
    assert found.states
    rng = random.Random(1)
    # What is in the class, and what is out of it: some of each alone, all of them together.
    inside = re.findall(category, EVERYTHING)
    outside = re.sub(category, "", EVERYTHING)
    assert not found.found(outside)
    assert all(found.found(c) for c in rng.sample(inside, min(300, len(inside)))) and searcher(f"\\A(?:{category})*\\Z").found("".join(inside))


@pytest.mark.parametrize("expression", ["(a+)+b", "(a|a)*b", "(a?){30}a{29}b", "(.*)*x", ".*.*.*.*x", "((a{1,20}){1,20})x", r"(\w+\s?)+!$", "(?:a|aa)+?c"])
def test_expressions_that_backtrack_for_ever_are_searched_nonetheless(expression):
    assert not refused([expression])
    assert not searcher(expression).found("a" * 100_000)


@pytest.mark.parametrize("expression", [r"(a+)+\bb", "(?=(a+)+b)", r"(a+)+\1b", "(?>(a+)+)b", "(a|aa)*+b", r"(a?){30}a{30}\b", "(?i)(É+)+b", "(a{1,1000}){1,1000}b", r"(?<!x)(a|aa){40}b", "((a{1,30}){1,30})x", r"\b((a|b){1,20}){1,63}", r"\b(x*){0}(a|a)+b"])
def test_what_no_automaton_searches_and_could_take_long_is_refused_in_one_line(expression):
    said = refused(["fine", expression])
    assert said.startswith("stop_regex ") and repr(expression) in said and "allowed: " in said and "\n" not in said


@pytest.mark.parametrize("expression", [r"\bEND\b", r"(?<=\n)User:", r"(?<!\\)\"", r"(?:User|Human)(?=:)", r"(['\"])end\1"])
def test_what_no_automaton_searches_and_cannot_take_long_stays_with_python(expression):
    assert not refused([expression]) and searcher(expression).states == 0


def test_what_one_request_searches_for_is_small_together():
    assert not refused(["(a{1,10}){1,10}b+"] * 5)
    assert f"up to {MOST_STATES}" in refused(["(a{1,10}){1,10}b+"] * 6)
    assert not refused([r"\bEND\b"] * 32)
    assert f"up to {MOST_STEPS}" in refused([r"\b(ab|cde){4}\b"] * 32)


def test_a_flag_in_a_group_is_in_place_of_that_outside():
    assert searcher(r"(?a)x(?u:\w)").found("xé") and not searcher(r"(?a)x\w").found("xé")


@pytest.mark.parametrize("expression", ["(", r"\1", "a{2,1}", "*"])
def test_what_python_cannot_read_is_refused_in_one_line(expression):
    assert "is not valid" in refused([expression])
