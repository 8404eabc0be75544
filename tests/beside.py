"""Long commands of single tests that need one core and no server: in a whole run they go beside the first tests of the servers, which wait much.

Their tests come behind those then; in a run without servers each runs its command when it is its turn.
"""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 600

_BEGUN = pytest.StashKey[dict[tuple[str, ...], Future]]()


def run(arguments: tuple[str, ...]) -> subprocess.CompletedProcess:
    """``python`` with these arguments on this checkout, one thread, kernels interpreted where there is no GPU."""
    from idlm_sglang.platform import accelerator_available

    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {} if accelerator_available() else {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)


def finished(config: pytest.Config, *arguments: str) -> subprocess.CompletedProcess:
    """The command's end: of the run that was begun for it, else of one that is begun now."""
    begun = config.stash.get(_BEGUN, {}).get(arguments)
    return begun.result() if begun else run(arguments)


def begin(config: pytest.Config, commands: list[tuple[str, ...]]) -> None:
    """Run the commands in the background, one after the other. Behind the first call nothing is begun."""
    if _BEGUN not in config.stash:
        pool = ThreadPoolExecutor(1)
        config.stash[_BEGUN] = {arguments: pool.submit(run, arguments) for arguments in commands}
        pool.shutdown(wait=False)


def cancel(config: pytest.Config) -> None:
    """What has not begun when the run ends early is not begun any more."""
    for future in config.stash.get(_BEGUN, {}).values():
        future.cancel()
