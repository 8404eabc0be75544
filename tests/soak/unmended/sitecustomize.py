"""On PYTHONPATH this leaves out the hooks that SOAK_WITHOUT names, separated by commas, in every process a server starts."""

import os

from idlm_sglang import compat

LEFT_OUT = os.environ["SOAK_WITHOUT"].split(",")
assert {patch.hook.__name__ for patch in compat.PATCHES} >= set(LEFT_OUT), f"SOAK_WITHOUT={LEFT_OUT} names what is no hook"
compat.PATCHES = tuple(patch for patch in compat.PATCHES if patch.hook.__name__ not in LEFT_OUT)
