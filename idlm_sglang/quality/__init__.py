"""`idlm eval`: lm-eval's benchmarks asked of several endpoints, compared question by question.

options -> endpoints -> (benchmarks) -> lm-eval with `client` -> `scores` -> `statistics` -> `report`. Nothing here imports SGLang.
"""
