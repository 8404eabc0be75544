"""The Makefile, the pinned closure and .ci/run: what a fresh machine installs from."""

import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def make(*words: str, **environ: str) -> subprocess.CompletedProcess:
    plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "VENV", "PORT", "ARGS", "MODEL")}
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, env=plain | environ)


def pins() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [line.split("==") for line in lines if line]
    assert all(len(pair) == 2 for pair in found), "a line that is no exact pin"
    return {canonicalize_name(name): version for name, version in found}


def closure(name: str, *extras: str) -> dict[str, str]:
    """Installed version of everything the installed `name[extras]` needs, from the packages' own metadata."""
    versions: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        if (canonicalize_name(name), extra) in done:
            continue
        done.add((canonicalize_name(name), extra))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # a marker of another platform that packaging could not rule out
        versions[canonicalize_name(name)] = found.version
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed.name, wanted) for wanted in ("", *needed.extras)]
    return versions


def test_every_package_of_the_installed_closure_is_pinned_at_its_version():
    pinned, needed = pins(), closure("idlm-sglang", "test")
    needed.pop("idlm-sglang")
    print(f"{len(needed)} packages in the closure, {len(pinned)} pinned")
    assert len(needed) > 150
    assert {name: pinned.get(name) for name in needed} == needed


def test_nothing_is_pinned_that_nothing_needs():
    assert set(pins()) <= set(closure("idlm-sglang", "test"))


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="idlm")
    assert command.value == "idlm_sglang.serving.cli:main"


def test_the_tool_that_builds_the_package_is_pinned():
    assert "setuptools" in pins()
    assert "PIP_CONSTRAINT=constraints.txt" in make("-n", "install", "VENV=/nonexistent/venv").stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
class TestMakefile:
    def test_help_is_the_default_and_lists_every_target(self):
        shown = make().stdout
        targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
        assert all(re.search(rf"^  {target}\s+\w", shown, re.MULTILINE) for target in targets)

    def test_serve_installs_first_and_serves_the_embedded_checkpoint_on_port_30000(self):
        planned = make("-n", "serve", "VENV=/nonexistent/venv").stdout
        install, serve = planned.index("pip install -c constraints.txt -e '.[test]'"), planned.index('/idlm" serve')
        assert install < serve and '--port "30000"' in planned and "about 11 GB and 3 minutes" in planned

    def test_port_model_and_further_flags_are_handed_on(self):
        planned = make("-n", "serve", "VENV=/nonexistent/venv", "PORT=31200", "MODEL=/models/m", "ARGS=--stride 8").stdout
        assert 'serve "/models/m" --host "127.0.0.1" --port "31200" --stride 8' in planned

    def test_an_environment_that_is_there_is_reused_and_a_changed_pin_installs_again(self, tmp_path):
        stamp = tmp_path / ".idlm-installed"
        stamp.write_text(f"{ROOT}\n")
        assert "pip install" not in make("-n", "test", f"VENV={tmp_path}").stdout
        os.utime(stamp, (0, 0))
        assert "pip install" in make("-n", "test", f"VENV={tmp_path}").stdout
        stamp.write_text("/another/checkout\n")
        assert "pip install" in make("-n", "test", f"VENV={tmp_path}").stdout

    def test_a_python_that_cannot_be_used_is_named(self, tmp_path):
        done = make("install", f"VENV={tmp_path}/venv", "PYTHON=/bin/false")
        assert done.returncode != 0 and "make: PYTHON=/bin/false will not do; allowed: Python 3.11 or 3.12" in done.stderr


def test_ci_runs_make_test_and_stops_at_the_first_mistake():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text and "make test" in text
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
