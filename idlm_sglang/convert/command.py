"""`idlm convert` on the command line. torch and what stands on it are imported only once the command is understood."""

import argparse
import sys
from collections.abc import Sequence

from idlm_sglang.config import SettingError
from idlm_sglang.convert import options

_FAILED, _MISTAKE, _INTERRUPTED = 1, 2, 130


def main(words: Sequence[str], kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    """Parse, train, and return the exit code. A mistake is one line on standard error."""
    try:
        plan = options.resolve(options.parser(kind).parse_args(words))
        from idlm_sglang.convert import train
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return _MISTAKE
    except ModuleNotFoundError as missing:
        print(f"idlm: convert needs {missing.name}, which is not installed; allowed: pip install {missing.name}", file=sys.stderr)
        return _FAILED
    try:
        train.run(plan)
        return 0
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return _MISTAKE
    except train.Failed as failed:
        print(f"idlm: {failed}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("idlm: interrupted; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
