"""The tests of this folder, with Triton interpreted on the host: see `conftest.py`."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_pass_their_tests_interpreted():
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "-s", str(Path(__file__).parent)]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    print(result.stdout[-6000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
