"""``python -m sglang.launch_server`` with fewer garbage collections: each of its three processes imports in three quarters of the time.

SGLang starts its processes by importing this module again.
"""

import gc
import runpy

gc.set_threshold(100_000, 50, 100)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
