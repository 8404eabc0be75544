"""`idlm bench` from a checkout: python -m benchmarks.ab --help"""

import sys

from idlm_sglang.serving.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
