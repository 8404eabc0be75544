"""`idlm eval` on the command line. What it needs besides this package is imported only once the command is understood."""

import argparse
import sys
from collections.abc import Sequence

from idlm_sglang.config import SettingError
from idlm_sglang.quality import harness, options

_MISTAKE, _INTERRUPTED = 2, 130


def main(words: Sequence[str], kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    """Parse, run, and return the exit code. A mistake is one line on standard error."""
    try:
        plan = options.resolve(options.parser(kind).parse_args(words))
        harness.prepare(plan)
        from idlm_sglang.quality.run import run

        return run(plan, words)
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return _MISTAKE
    except KeyboardInterrupt:
        print("idlm: interrupted; with --out the answers so far are kept, and --resume goes on", file=sys.stderr)
        return _INTERRUPTED
