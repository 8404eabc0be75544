"""``python -m sglang.launch_server``, started sooner: fewer garbage collections, and no scikit-learn.

SGLang starts its processes by importing this module again.
"""

import gc
import runpy
import sys

gc.set_threshold(100_000, 50, 100)
sys.modules["sklearn"] = None  # transformers imports it where it is there, which is where the tests' lm-eval is

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
