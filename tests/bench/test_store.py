"""Raw results: nothing is lost in a break, and two comparisons never mix."""

import json

import pytest

from idlm_sglang.bench.load import Point
from idlm_sglang.bench.store import FILE, Store
from idlm_sglang.config import SettingError

PLAN = {"arms": [{"name": "ar"}], "repeats": 3}
POINT, OTHER = Point("ar", 0.0, 4, 0), Point("ar", 0.0, 8, 0)


@pytest.fixture
def begun(tmp_path):
    store = Store(tmp_path)
    store.begin(PLAN, {"device": "a"})
    store.add(POINT, {"x": 1})
    return tmp_path


def test_points_are_there_after_a_break_in_the_middle_of_a_line(begun):
    with (begun / FILE).open("a") as file:
        file.write('{"point": {"arm": "ar", "tempe')
    again = Store(begun)
    assert again.results == {POINT: {"x": 1}}
    again.begin(PLAN, {"device": "a"})
    again.add(OTHER, {"x": 2})
    assert Store(begun).results == {POINT: {"x": 1}, OTHER: {"x": 2}}
    assert all(json.loads(line) for line in (begun / FILE).read_text().splitlines())


def test_a_break_in_the_first_line_is_an_empty_store(tmp_path):
    (tmp_path / FILE).write_text('{"plan": ')
    store = Store(tmp_path)
    store.begin(PLAN, {"device": "a"})
    assert Store(tmp_path).plan == PLAN


def test_another_plan_is_refused_with_what_differs(begun):
    with pytest.raises(SettingError, match=r"holds another comparison \(repeats differ\)"):
        Store(begun).begin({**PLAN, "repeats": 5}, {"device": "a"})
    assert Store(begun).plan == PLAN


def test_another_machine_is_written_down(begun):
    store = Store(begun)
    store.begin(PLAN, {"device": "b"})
    assert Store(begun).fingerprints == [{"device": "a"}, {"device": "b"}]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / FILE).write_text('{"something": "else"}\n')
    with pytest.raises(SettingError, match="line 1 is no result"):
        Store(tmp_path)
