"""The algorithm and the kernels know nothing of the engine."""

import os
import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module({name!r})
names = [module.name for module in pkgutil.walk_packages(package.__path__, {name!r} + ".")]
for name in names:
    importlib.import_module(name)
foreign = [name for name in sys.modules if name.split(".")[0] == "sglang"]
foreign += [name for name in sys.modules if name.startswith("idlm_sglang.") and not name.startswith({name!r})]
assert not foreign, foreign
print(len(names))
"""


def import_all(name: str, path: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", IMPORT_ALL.format(name=name)]
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("name, modules", [("idlm_sglang.isd", 7), ("idlm_kernels", 8)])
def test_no_module_imports_the_engine(name, modules):
    result = import_all(name)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= modules


def test_an_import_of_the_engine_is_noticed(tmp_path):
    """A package whose submodule imports a stand-in for the engine."""
    for name, text in (("sglang/__init__.py", ""), ("planted/__init__.py", ""), ("planted/worker.py", "import sglang")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert "AssertionError: ['sglang']" in import_all("planted", str(tmp_path)).stderr
