"""Raw results: nothing is lost in a break, and two comparisons never mix."""

import json
from dataclasses import replace

import pytest

from idlm_sglang.bench.load import Point
from idlm_sglang.bench.store import FILE, Store
from idlm_sglang.config import SettingError

PLAN = {"arms": [{"name": "ar"}], "repeats": 3}
POINT, OTHER = Point("ar", 0.0, 4, 0), Point("ar", 0.0, 8, 0)


@pytest.fixture
def begun(tmp_path):
    store = Store(tmp_path)
    store.begin(PLAN)
    store.add(POINT, {"x": 1})
    return tmp_path


def test_points_are_there_after_a_break_in_the_middle_of_a_line(begun):
    with (begun / FILE).open("a") as file:
        file.write('{"point": {"arm": "ar", "tempe')
    again = Store(begun)
    assert again.results == {POINT: {"x": 1}}
    again.begin(PLAN)
    again.add(OTHER, {"x": 2})
    assert Store(begun).results == {POINT: {"x": 1}, OTHER: {"x": 2}}
    assert all(json.loads(line) for line in (begun / FILE).read_text().splitlines())


def test_a_break_in_the_first_line_is_an_empty_store(tmp_path):
    (tmp_path / FILE).write_text('{"plan": ')
    store = Store(tmp_path)
    store.begin(PLAN)
    assert Store(tmp_path).plan == PLAN


def test_another_plan_is_refused_with_what_differs(begun):
    with pytest.raises(SettingError, match=r"holds another comparison \(repeats differ\)"):
        Store(begun).begin({**PLAN, "repeats": 5})
    assert Store(begun).plan == PLAN


def test_every_server_is_written_down(begun):
    Store(begun).told({"device": "b"})
    Store(begun).told({"device": "c"})
    assert Store(begun).fingerprints == [{"device": "b"}, {"device": "c"}]


def test_a_point_without_its_twins_is_measured_again(begun):
    """A ratio pairs what was measured in turn, not what was measured before and behind a break."""
    store = Store(begun)
    store.add(OTHER, {"x": 2})
    store.add(replace(OTHER, arm="isd"), {"x": 3})
    again = Store(begun)
    again.drop_incomplete(["ar", "isd"])
    assert set(again.results) == {OTHER, replace(OTHER, arm="isd")}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="--out .* cannot be written"):
        Store(tmp_path / "file" / "x").begin(PLAN)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / FILE).write_text('{"something": "else"}\n')
    with pytest.raises(SettingError, match="line 1 is no result"):
        Store(tmp_path)
