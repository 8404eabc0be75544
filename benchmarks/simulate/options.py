"""What `python -m benchmarks.simulate` is asked for; a mistake ends in one line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.simulate.predict import CLIENTS
from idlm_sglang.config import SettingError

RESULTS = Path(__file__).resolve().parent.parent / "results"

_DESCRIPTION = """\
Predicts the speed-up of ISD over AR on hardware that is not at hand: Qwen3-8B and 32B dimensions, H100 and H200, TP1 and TP4, bf16 and FP8,
fixed strides and the server's stride controller. A model, not a measurement: docs/simulation.md.

Writes CSVs, plots and table.md."""


@dataclass(frozen=True)
class Options:
    """As typed, checked.

    Attributes:
        clients: concurrencies. waves: answers for each slot behind the first. warm: the first step behind a prefill has drafts.
        bench, step_time: results of `idlm bench` and `benchmarks.step_time` of one machine, for the cost of stride 1 and the check.
        single_ms, single_share: that cost, instead of what ``bench`` says.
        render: only the page and the plots again.
    """

    clients: tuple[int, ...]
    waves: int
    warm: bool
    bench: tuple[Path, ...]
    step_time: Path
    single_ms: float | None
    single_share: float | None
    seed: int
    out: Path
    render: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"simulate: {message}; see --help\n")


def parse(argv: Sequence[str]) -> Options:
    """Options from a command line. Raises SettingError, or exits with one line, on what cannot be simulated."""
    parser = _Parser(prog="python -m benchmarks.simulate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option, ab = parser.add_argument, RESULTS / "ab" / "cpu-2-cores"
    option("--clients", nargs="+", type=int, default=list(CLIENTS), metavar="C", help="concurrent requests (default 1 2 4 .. 256)")
    option("--waves", type=int, default=3, help="answers for each slot behind the one it begins with; more, the less the controller's learning counts (default 3)")
    option("--warm", action="store_true", help="the first step behind a prefill has drafts to verify")
    option("--bench", nargs="+", type=Path, default=[ab / "lengths"], metavar="DIR", help="results of idlm bench with the arms stock and isd:1; a later folder replaces concurrencies of earlier ones")
    option("--step-time", type=Path, default=RESULTS / "step_time" / "cpu-2-cores" / "demo", metavar="DIR", help="step times of the same machine")
    option("--single-ms", type=float, metavar="MS", help="milliseconds that a step at stride 1 costs over AR (default: as measured in --bench at C = 1)")
    option("--single-share", type=float, metavar="SHARE", help="share of AR's speed that stride 1 loses (default: as measured in --bench at C = 1)")
    option("--seed", type=int, default=0)
    option("--out", type=Path, default=RESULTS / "simulate")
    option("--render", action="store_true", help="only write the page and the plots again")
    got = parser.parse_args(argv)
    options = Options(tuple(sorted(set(got.clients))), got.waves, got.warm, tuple(got.bench), got.step_time, got.single_ms, got.single_share, got.seed, got.out, got.render)
    for c in options.clients:
        if not 1 <= c <= 4096:
            raise SettingError(f"--clients {c} is out of range; allowed: an integer from 1 to 4096")
    if not 1 <= options.waves <= 1000:
        raise SettingError(f"--waves {options.waves} is out of range; allowed: an integer from 1 to 1000")
    if options.single_ms is not None and not 0 <= options.single_ms <= 1000:
        raise SettingError(f"--single-ms {options.single_ms:g} is out of range; allowed: 0 to 1000 milliseconds")
    if options.single_share is not None and not 0 <= options.single_share < 1:
        raise SettingError(f"--single-share {options.single_share:g} is out of range; allowed: a share from 0 to below 1")
    if not (options.step_time / "raw.csv").is_file():
        raise SettingError(f"--step-time {options.step_time} holds no raw.csv; allowed: a folder of python -m benchmarks.step_time")
    return options
