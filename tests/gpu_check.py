"""The checks of docs/gpu-validation.md that need a GPU, one behind another: ``make gpu-check``, or

    python -m tests.gpu_check [--list] [--only NAME ...] [--minutes 25] [--out DIR]

What has to be right comes first, what has to be fast last. A check that fails or takes too long does not keep the next from running.
DIR (gpu-check) gets a log of each, and table.md: what was run where, what came of it. The exit code is 1 where one did not pass.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
GRAPHS, KERNELS, BRANCH = {"IDLM_DECODE_GRAPHS": "on"}, {"IDLM_STEP_OPS": "triton"}, {"IDLM_SALVAGE": "branch"}
_MARK = "IDLM_GPU_CHECK"  # in the environment of whatever a check starts
# Of one kind in both arms: SGLang's choice for AR, FA3, is not everywhere, and another one's answers in bf16 are others'.
_ALIKE = ("--attention-backend", "triton", "--sampling-backend", "pytorch")
# Decode steps are measured; capturing prompts takes minutes.
_NO_PROMPT_GRAPHS = ("--cuda-graph-backend-prefill", "disabled")


@dataclass(frozen=True)
class Check:
    """One command.

    Attributes:
        name: short, and that of its log.
        command: behind the interpreter.
        limit: seconds after which it is ended.
        environ: on top of this process's.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    environ: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environ.items()), "python", *self.command])


def _tests(*words: str) -> tuple[str, ...]:
    return "-m", "pytest", "-q", "-p", "no:cacheprovider", *words


# Compiling a kernel takes one core, and there is one for nearly every shape.
_AT_A_TIME = ("-n", str(min(os.cpu_count() or 1, 12))) if importlib.util.find_spec("xdist") else ()
_OPS = ("--device", "cuda", "--threads", "8")
_ANSWERS = tuple(f"tests/server/test_{name}.py" for name in ("identity", "sampling", "stride_switch"))


def _bench_arm(name: str, kind: str, *more: str) -> tuple[str, str]:
    return "--arm", shlex.join([f"{name}={kind}", "--dtype", "bfloat16", "--mem-fraction-static", "0.15", *_ALIKE, *more])


CHECKS = (
    Check("plugin", ("-m", "idlm_sglang.serving.cli", "check"), 120),
    Check("answers", _tests(*_ANSWERS), 480),
    Check("kernels", _tests(*_AT_A_TIME, "tests/kernels"), 420),
    Check("captured", _tests("-s", "tests/engine/test_graphs.py"), 240),
    Check("answers-graphs", _tests(*_ANSWERS), 420, GRAPHS),
    Check("answers-graphs-kernels", _tests("tests/server/test_identity.py"), 300, GRAPHS | KERNELS),
    Check("answers-branch", _tests("tests/server/test_branch_triton.py"), 240),
    Check("answers-branch-graphs", _tests("tests/server/test_identity.py"), 300, BRANCH | GRAPHS),
    Check("adapter-layers", _tests("tests/engine/test_lora.py"), 180),
    Check("adapter", _tests("tests/server/test_risd.py"), 300),
    Check("adapter-graphs", _tests("tests/server/test_risd.py"), 300, GRAPHS),
    Check("retraction", _tests("tests/server/test_tight.py"), 420),
    Check("step-ops", _tests("tests/server/test_step_ops.py"), 240),
    Check("ops", ("-m", "benchmarks.kernels", *_OPS, "--quick", "--out", "{out}/ops"), 420),
    Check("ops-choose", ("-m", "benchmarks.kernels", "choose", *_OPS, "--seconds", "0.005", "--out", "{out}/ops"), 420),
    Check("ops-verify", ("-m", "benchmarks.kernels", "verify", "step", *_OPS, "--seconds", "0.005", "--out", "{out}/ops"), 420),
    *(
        Check(
            name,
            ("-m", "benchmarks.step_time", "--batch", "1", "32", "64", "--strides", "1", "2", "4", "8", "--context", "1024", "--out", f"{{out}}/{name}", "--", *_ALIKE, *_NO_PROMPT_GRAPHS),
            600,
            environ,
        )
        for name, environ in (("steps", {}), ("steps-graphs", GRAPHS), ("steps-graphs-kernels", GRAPHS | KERNELS))
    ),
    Check(
        "bench",
        (
            *("-m", "idlm_sglang.serving.cli", "bench", "--together", "--concurrency", "1", "16", "64", "--temperature", "0", "--repeats", "3", "--out", "{out}/bench"),
            *_bench_arm("stock", "stock"),
            *_bench_arm("n1", "isd:1", "--decode-graphs", "on"),
            *_bench_arm("n4", "isd:4", "--decode-graphs", "on"),
            *_bench_arm("n4eager", "isd:4"),
        ),
        480,
    ),
)


def run(check: Check, out: Path, limit: float) -> tuple[str, float, str]:
    """``passed``, ``failed`` or ``too long``; seconds; and what it said last. Nothing of it runs behind this."""
    began, log, mark = time.monotonic(), out / f"{check.name}.log", uuid.uuid4().hex
    command = [sys.executable, *(word.replace("{out}", str(out)) for word in check.command)]
    with log.open("wb") as file:
        environ = os.environ | check.environ | {_MARK: mark}
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=file, start_new_session=True)
        try:
            state = "passed" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "too long"
        finally:
            _end(process, mark)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return state, time.monotonic() - began, said[-1].strip("= ")[:160] if said else ""


def _end(process: subprocess.Popen, mark: str) -> None:
    """It, which gets a moment to end its servers itself, and the servers: they have sessions of their own, and hold memory of the GPU."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    for left in psutil.process_iter():
        with suppress(psutil.Error):
            if left.environ().get(_MARK) == mark:
                left.kill()
    process.wait()


def chosen(names: Sequence[str]) -> list[Check]:
    """The checks of these names, all without any; the table's order."""
    known = {check.name: check for check in CHECKS}
    for name in names:
        if name not in known:
            raise SystemExit(f"gpu_check: --only {name} is not a check; allowed: {', '.join(known)}")
    return [check for check in CHECKS if not names or check.name in names]


def run_all(checks: Sequence[Check], out: Path, minutes: float, where: str, say: Callable[[str], None] = partial(print, flush=True)) -> int:
    """Run them, write table.md behind each; the number that did not pass."""
    out.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + 60 * minutes, []
    for check in checks:
        left = end - time.monotonic()
        state, seconds, said = run(check, out, min(check.limit, left)) if left > 0 else ("no time left", 0.0, "")
        rows.append(f"| {check.name} | {state} | {seconds:.0f} | `{check}` | {said.replace('|', '/')} |")
        say(f"{check.name}: {state}, {seconds:.0f} s: {said}")
        lines = ["# Checks on a GPU", "", where, "", "| check | state | s | command | last line |", "|---|---|---:|---|---|", *rows]
        (out / "table.md").write_text("\n".join(lines) + "\n")
    return sum("| passed |" not in row for row in rows)


def _where() -> str:
    import torch

    from idlm_sglang.serving.device import device_name

    return f"{time.strftime('%Y-%m-%d')}, {device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--minutes", type=float, default=120.0, help="for all of them (default 120)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    asked = parser.parse_args(argv)
    checks = chosen(asked.only)
    if asked.list:
        print("\n".join(f"{check.name}: {check}" for check in checks))
        return 0
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: this machine has no GPU that torch can use; allowed: --list, or a machine with one")
    return 1 if run_all(checks, asked.out.resolve(), asked.minutes, _where()) else 0


if __name__ == "__main__":
    sys.exit(main())
