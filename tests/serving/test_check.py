"""`idlm check`: a line per item, a code that a script can trust."""

import pytest

from idlm_sglang import demo
from idlm_sglang.config import SettingError
from idlm_sglang.serving import check

ITEMS = ("python", "sglang", "prometheus", "checkpoint", "port", "disk", "memory", "shared memory", "entry points", "torch", "adapter", "hooks", "platform")


def test_every_item_has_one_line_and_this_environment_can_serve(sglang_says):
    # Asked with port 0, which is no port to serve on: that item alone fails.
    lines = sglang_says["check"]["report"].splitlines()
    print("\n".join(lines))
    assert len(lines) == len(ITEMS) + 1
    for name, line in zip(ITEMS, lines):
        assert line[6:].startswith(name)
        assert line.startswith("FAIL" if name == "port" else ("ok ", "warn"))
    assert "--port 0 is out of range; allowed: an integer from 1 to 65535" in lines[ITEMS.index("port")]
    assert sglang_says["check"]["code"] == 1 and lines[-1].startswith("idlm: 1 of the above")


@pytest.fixture
def report(monkeypatch, capsys):
    """The report with items replaced by one under test."""

    def of(name, look):
        monkeypatch.setattr(check, "_looks", lambda host, port: [(name, look)])
        return check.run("127.0.0.1", "30000"), capsys.readouterr().out.splitlines()

    return of


def test_all_items_ok_is_exit_code_0(report):
    assert report("python", check.python) == (0, [f"ok    python         {check.python()[1]}", "idlm: ready to serve"])


def test_whatever_goes_wrong_while_looking_is_a_line_not_a_stack_trace(report):
    def broken():
        raise RuntimeError("first line\nsecond line")

    code, lines = report("hooks", broken)
    assert code == 1 and lines[0] == "FAIL  hooks          RuntimeError: first line" and len(lines) == 2

    def refused():
        raise SettingError("SGLang 0.6 is installed")

    assert report("sglang", refused)[1][0] == "FAIL  sglang         SGLang 0.6 is installed"


def test_a_changed_checkpoint_fails(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(demo, "CHECKPOINT_DIR", tmp_path)
    monkeypatch.setattr(demo, "CHECKPOINT_SHA256", "0" * 64)
    status, text = check.embedded_checkpoint()
    assert status == check.FAIL and "expected 000000000000" in text
    (tmp_path / "model.safetensors").unlink()
    assert check.embedded_checkpoint()[0] == check.FAIL


def test_an_entry_point_found_twice_or_never_fails(monkeypatch):
    found = list(check.entry_points(group="sglang.srt.plugins"))
    assert check.registered()[0] == check.OK
    monkeypatch.setattr(check, "entry_points", lambda group: found * 2)
    assert check.registered()[0] == check.FAIL
    monkeypatch.setattr(check, "entry_points", lambda group: [])
    assert check.registered()[0] == check.FAIL


def test_another_installation_than_the_running_one_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "_installed_at", lambda: tmp_path)
    status, text = check.registered()
    assert status == check.FAIL and str(tmp_path) in text
