"""Where one decode step spends its time, and the speed-up it allows: ``python -m benchmarks.step_time --help``."""
