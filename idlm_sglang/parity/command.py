"""`idlm parity` on the command line. What it needs besides this package is imported only once the command is understood."""

import argparse
import sys
from collections.abc import Sequence

from idlm_sglang.config import SettingError
from idlm_sglang.parity import options

_MISTAKE, _INTERRUPTED = 2, 130


def main(words: Sequence[str], kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    """Parse, run, and return the exit code. A mistake is one line on standard error."""
    try:
        plan = options.resolve(options.parser(kind).parse_args(words))
        from idlm_sglang.parity.run import run
        from idlm_sglang.quality.endpoint import EndpointError

        try:
            return run(plan)
        except EndpointError as failed:
            print(failed, file=sys.stderr)
            return _MISTAKE
    except ModuleNotFoundError as missing:
        print(f"idlm: parity needs {missing.name}, which is not installed; allowed: pip install 'idlm-sglang[parity]'", file=sys.stderr)
        return _MISTAKE
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return _MISTAKE
    except KeyboardInterrupt:
        print("idlm: interrupted", file=sys.stderr)
        return _INTERRUPTED
