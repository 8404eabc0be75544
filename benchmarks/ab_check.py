"""Does `idlm bench` find what is there, and nothing else? Two equal arms and one with a planted slowdown.

    python -m benchmarks.ab_check [--slowdown 0.25] [--out DIR] [words of idlm bench ...]

Three servers of the embedded checkpoint in AR: `ar`, the same again as `equal`, and `slow`, whose scheduler takes a quarter
longer for each pass, which leaves 0.8 of the throughput where the server is the limit. Ends with an error unless every
interval of `slow` lies below 1, and those of `equal` hold 1 as often as 95 % intervals do (binomial, 99.9 %).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from scipy.stats import binom

from benchmarks.server import running
from idlm_sglang.bench.store import Store
from idlm_sglang.bench.summary import CONFIDENCE, cells
from idlm_sglang.serving import cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slowdown", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=None)
    own, words = parser.parse_known_args()
    out = own.out or Path(tempfile.mkdtemp(prefix="ab-check-"))
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "planted"), os.environ.get("PYTHONPATH")]))
    with running(["--ar", "--sleep-on-idle"], {"PYTHONPATH": path, "PLANTED_SLOWDOWN": str(own.slowdown)}, radix=True) as url:
        arms = ["--arm", "ar", "--arm", "equal=ar", "--arm", f"slow={url}"]
        code = cli.main(["bench", *arms, "--out", str(out), *words])
    found = cells(Store(out).results, ["ar", "equal", "slow"])
    missed = [c for c in found if c.arm == "slow" and not (c.ratio.high is not None and c.ratio.high < 1)]
    wrong = [c for c in found if c.arm == "equal" and not (c.ratio.low is not None and c.ratio.low <= 1 <= c.ratio.high)]
    allowed = int(binom.ppf(0.999, len(found) // 3, 1 - CONFIDENCE))
    for name, some in (("not found", missed), (f"found where there is none (up to {allowed} by chance)", wrong)):
        for c in some:
            print(f"{name}: {c.arm} at C = {c.concurrency}, T = {c.temperature:g}: {c.ratio}")
    return code or bool(missed or len(wrong) > allowed)


if __name__ == "__main__":
    sys.exit(main())
