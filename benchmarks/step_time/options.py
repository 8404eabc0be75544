"""What `python -m benchmarks.step_time` is asked for: checked before anything starts, a mistake ends in one line."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from benchmarks.step_time import dummy
from idlm_sglang.config import MAX_STRIDE, SettingError
from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.platform import accelerator_available
from idlm_sglang.serving.device import device_name

DEMO, DUMMY = "demo", "8b"
TIMERS, TRACE = "timers", "trace"
WALL, CPU = "wall", "cpu"
RESULTS = Path(__file__).resolve().parent.parent / "results" / "step_time"

_DESCRIPTION = """\
Where one decode step spends its time, AR and ISD, and the speed-up that the step times allow.

Real servers (`idlm serve`), a fixed running batch, steady decode. Writes raw.csv, table.md, plot.png and fingerprint.json;
measuring other batches or contexts later adds to them."""


@dataclass(frozen=True)
class Options:
    """As typed, checked.

    Attributes:
        model: DEMO, DUMMY or a checkpoint's path; dims: replaced dimensions of DUMMY.
        batches, strides, contexts: what to measure; AR always is.
        tokens: committed tokens per request that the measured steps span, half of them before the context and half behind.
        sampling: sampling parameters of every request.
        steps, repeats: least number of steps and runs for a point.
        method: TIMERS or TRACE.
        clock: WALL, or CPU: the scheduler thread's own processor time.
        acceptance, tpf: instead of measured tokens per forward.
        server_flags: for both servers.
    """

    model: str
    dims: dict[str, int]
    batches: tuple[int, ...]
    strides: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int
    sampling: dict
    steps: int
    repeats: int
    method: str
    clock: str
    acceptance: float | None
    tpf: dict[int, float]
    tpf_prompts: int
    out: Path
    render: bool
    server_flags: tuple[str, ...] = field(default=())

    @property
    def positions(self) -> int:
        """Positions the model has."""
        if self.model == DUMMY:
            return self.dims.get("max_position_embeddings", dummy.DIMENSIONS["max_position_embeddings"])
        directory = CHECKPOINT_DIR if self.model == DEMO else Path(self.model)
        return json.loads((directory / "config.json").read_text())["max_position_embeddings"]

    @property
    def longest(self) -> int:
        """Columns a request may need behind its context: what it writes on while others finish, and a step's rows."""
        return 2 * self.tokens + 2 * (2 * max(self.strides) - 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"step_time: {message}; see --help\n")


def parse(argv: Sequence[str]) -> Options:
    """Options from a command line. Raises SettingError, or exits with one line, on what cannot be measured."""
    parser = _Parser(prog="python -m benchmarks.step_time", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option = parser.add_argument
    gpu = accelerator_available()
    option("--model", help=f"{DEMO} (the embedded checkpoint), {DUMMY} (Qwen3-8B's dimensions, dummy weights) or a checkpoint's directory; default: {DUMMY if gpu else DEMO} here")
    option("--dims", nargs="+", default=[], metavar="NAME=VALUE", help=f"other dimensions for --model {DUMMY}, as config.json names them")
    option("--batch", nargs="+", type=int, default=[1, 8, 64], metavar="B", help="running requests (default 1 8 64)")
    option("--strides", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="ISD strides beside AR (default 1 2 4 8)")
    option("--context", nargs="+", type=int, default=[128, 1024], metavar="C", help="committed tokens per request, mean over the measured steps (default 128 1024)")
    option("--tokens", type=int, default=64, help="tokens per request that a run's measured steps span (default 64)")
    option("--sampling", type=_object, default={"temperature": 0}, metavar="JSON", help="sampling parameters of every request (default greedy)")
    option("--steps", type=int, default=100, help="least number of measured steps for a point (default 100)")
    option("--repeats", type=int, default=3, help="least number of runs for a point, AR and ISD in turn (default 3)")
    option("--method", choices=(TIMERS, TRACE), help=f"default: {TIMERS} on a CPU, {TRACE} (torch.profiler) on a GPU")
    option("--clock", choices=(WALL, CPU), default=WALL, help="cpu: processor time of the one thread that does it all, which busy neighbours do not stretch; with OMP_NUM_THREADS=1 only")
    option("--acceptance", type=float, metavar="P", help="tokens per forward from a constant acceptance of each draft")
    option("--tpf", nargs="+", default=[], metavar="N=VALUE", help="tokens per forward at stride N")
    option("--tpf-prompts", type=int, default=100, help=f"prompts that measure tokens per forward of --model {DEMO} (default 100; 0 keeps what --out has)")
    option("--out", type=Path, help="default: benchmarks/results/step_time/DEVICE/MODEL")
    option("--render", action="store_true", help="only write the table and the plot again, from raw.csv")
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    parser.epilog = "Words behind -- go to both servers, for example: -- --mem-fraction-static 0.8"
    got = parser.parse_args(words[:split])
    model = got.model or (DUMMY if gpu else DEMO)
    options = Options(
        model=model,
        dims=dict(_pair("--dims", word, int) for word in got.dims),
        batches=tuple(sorted(set(got.batch))),
        strides=tuple(sorted(set(got.strides))),
        contexts=tuple(sorted(set(got.context))),
        tokens=got.tokens,
        sampling=got.sampling,
        steps=got.steps,
        repeats=got.repeats,
        method=got.method or (TRACE if gpu else TIMERS),
        clock=got.clock,
        acceptance=got.acceptance,
        tpf={int(name): value for name, value in (_pair("--tpf", word, float) for word in got.tpf)},
        tpf_prompts=got.tpf_prompts,
        out=got.out or RESULTS / _slug(device_name()) / _slug(Path(model).name + ("" if _greedy(got.sampling) else "-sampled") + ("-one-thread" if got.clock == CPU else "")),
        render=got.render,
        server_flags=tuple(words[split + 1 :]),
    )
    _check(options)
    return options


def _check(o: Options) -> None:
    def refuse(shown: str, allowed: str) -> NoReturn:
        raise SettingError(f"{shown}; allowed: {allowed}")

    for flag, values, low, high in (("--batch", o.batches, 1, 4096), ("--strides", o.strides, 1, MAX_STRIDE), ("--tokens", (o.tokens,), 8, 4096)):
        for value in values:
            if not low <= value <= high:
                refuse(f"{flag} {value} is out of range", f"an integer from {low} to {high}")
    for flag, value, low in (("--steps", o.steps, 1), ("--repeats", o.repeats, 1), ("--tpf-prompts", o.tpf_prompts, 0)):
        if value < low:
            refuse(f"{flag} {value} is out of range", f"an integer >= {low}")
    threads = os.environ.get("OMP_NUM_THREADS")
    if o.clock == CPU and (threads != "1" or o.method != TIMERS):
        refuse(f"--clock {CPU} with OMP_NUM_THREADS={threads} and --method {o.method}", f"OMP_NUM_THREADS=1 and {TIMERS}, or --clock {WALL}")
    if o.acceptance is not None and not 0 <= o.acceptance <= 1:
        refuse(f"--acceptance {o.acceptance} is out of range", "a share from 0 to 1")
    for stride, value in o.tpf.items():
        if not 1 <= value <= stride:
            refuse(f"--tpf {stride}={value} is out of range", f"1 to {stride} tokens per forward at stride {stride}")
    if o.model not in (DEMO, DUMMY) and not (Path(o.model) / "config.json").is_file():
        refuse(f"--model {o.model} holds no config.json", f"{DEMO}, {DUMMY} or a checkpoint's directory")
    if o.dims and o.model != DUMMY:
        refuse(f"--dims has no meaning with --model {o.model}", f"only with --model {DUMMY}")
    for name in o.dims:
        if name not in dummy.DIMENSIONS:
            refuse(f"--dims {name} is not known", ", ".join(dummy.DIMENSIONS))
    shortest, longest = o.tokens // 2 + 8, o.positions - o.longest
    for context in o.contexts:
        if not shortest <= context <= longest:
            refuse(f"--context {context} does not fit --tokens {o.tokens} and the model's {o.positions} positions", f"{shortest} to {longest}")


def _pair(flag: str, word: str, kind: type) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        if flag == "--tpf":
            int(name)
        return name, kind(value)
    except ValueError:
        raise SettingError(f"{flag} {word} is not valid; allowed: {'N=VALUE' if flag == '--tpf' else 'NAME=INTEGER'}") from None


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object; allowed: for example {{\"temperature\": 1, \"top_p\": 0.95}}")
    return value


def _greedy(sampling: dict) -> bool:
    return sampling.get("temperature", 1) == 0 or sampling.get("top_k") == 1


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def command_line() -> str:
    """The command as typed, for the fingerprint."""
    return "python -m benchmarks.step_time " + " ".join(sys.argv[1:])
