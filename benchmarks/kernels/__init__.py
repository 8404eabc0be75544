"""Every op of ours that runs in a decode step, beside a plain-torch reference and the best library alternative.

    python -m benchmarks.kernels                                  # all ops, on the GPU where there is one
    python -m benchmarks.kernels target verify --device cpu       # some
    python -m benchmarks.kernels --quick                          # seconds per op, no CSV

One file per op: `attention`, `target` (temperature and filters), `noise`, `choose` (a token of every row), `verify`, `propose`, `step` (all of it behind the forward),
`sampler` (prefill and stride 1), `penalties`, `grammar`, `state` (layout and kept drafts), `page_table`. Each says what its alternatives
are and in what they differ. Sizes: the embedded checkpoint's vocabulary and 151,936; batch 1, 8, 64; stride 2, 4, 8.

How to read it:

- Before anything is timed, each arm's result is compared with the reference's. If ours is wrong the run ends there with exit code 1; a
  library that differs, or cannot run here, is printed as `not run` with the reason. Libraries that need a GPU are `not run: no GPU` without one.
- A table has the median microseconds of ours with its quartiles, and the other arms as multiples of it: 2.00x means twice as long as ours.
- An alternative with a note does less than ours, or something else: "no key" noise is another after every change of batch or stride, so it
  cannot give a seeded request the same text. The list at the end names every alternative that is faster beyond both spreads, with its note.
- On a CPU one thread is used and its CPU time is the clock, so a busy neighbour counts little; with `--threads` above 1 it is the wall
  clock, and the machine should be idle. On a GPU it is torch's clock with synchronisation.
- Arms take turns in five rounds (three where one call takes over half a second, and one for a reference of that kind); calls that
  would handle more than `--cells` logits on a CPU are not run. Inputs are random logits with 20 likely tokens per row: timings of a sort
  barely depend on them, timings of a shortcut may.
- The CSVs in `benchmarks/results/kernels/OP.DEVICE.csv` begin with the device, threads, load, versions, commit, command and date;
  `pandas.read_csv(path, comment="#")` reads them. A commit with a plus had uncommitted changes.
"""
