"""The order of a comparison: start the arms, measure in turn, write what came out."""

import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Drawing is tried before anything is measured: what it needs may not be installed.
from idlm_sglang.bench import fingerprint, one_batch, plots, prompts, table
from idlm_sglang.bench.arms import STOCK, Arm
from idlm_sglang.bench.load import Point
from idlm_sglang.bench.load import measure as measure_load
from idlm_sglang.bench.options import Options
from idlm_sglang.bench.servers import BenchError, Served, Servers, check_limit
from idlm_sglang.bench.store import Store
from idlm_sglang.bench.summary import cells
from idlm_sglang.platform import accelerator_available


def run(options: Options) -> int:
    """Measure what is not measured yet, write table and plots into ``options.out``, print the table. Returns the exit code.

    Raises:
        BenchError, SettingError: what was measured so far stays in ``options.out``, with its table and plots.
    """
    store = Store(options.out)
    source = prompts.read(options.prompts) if options.prompts else None
    if options.one_batch:
        one_batch.refuse([options.sampling, *(source or [])])
    store.begin(_described(options))
    store.drop_incomplete([arm.name for arm in options.arms])
    jobs = order(plan(options, _alone(options)), _alone(options), options.one_batch)
    _reach(options)
    try:
        if any(not _done(store, *job) for job in jobs):
            _measure(options, store, source, jobs)
    finally:
        if store.results:
            text = write(options.out, store)
    print(text)
    print(f"idlm: results in {options.out}")
    return 0


def plan(options: Options, alone: bool) -> list[Point]:
    """Every point, so that drift of the machine meets all arms: they alternate load by load, or, ``alone``, repeat by repeat.
    Each repeat begins with another arm."""
    names = [arm.name for arm in options.arms]
    loads = list(itertools.product(options.temperatures, options.concurrencies))
    found = []
    for repeat in range(options.repeats):
        first = repeat % len(names)
        turn = names[first:] + names[:first]
        order = ((load, name) for name in turn for load in loads) if alone else ((load, name) for load in loads for name in turn)
        found += [Point(name, *load, repeat) for load, name in order]
    # Together, the repeats of a load follow each other, so that early figures are whole ones.
    return found if alone else sorted(found, key=lambda point: loads.index((point.temperature, point.concurrency)))


def order(points: list[Point], alone: bool, batches: bool) -> list[tuple[Point, bool]]:
    """The points, each under load (False), and with ``batches`` in static batches, too (True). The arms take turns at the one before
    they do at the other, so that what is compared is measured side by side; ``alone``, while a server is up."""
    found = []
    for _, block in itertools.groupby(points, lambda p: (p.temperature, p.concurrency, p.repeat, p.arm if alone else None)):
        block = list(block)
        found += [(point, False) for point in block] + [(point, True) for point in block if batches]
    return found


def _done(store: Store, point: Point, batches: bool) -> bool:
    return point in (store.batches if batches else store.results)


def write(directory: Path, store: Store) -> str:
    """Table and plots of the results so far; the table as text."""
    arms = [arm["name"] for arm in store.plan["arms"]]
    found, batches = cells(store.results, arms), one_batch.cells(store.batches, arms)
    made = plots.draw(found, directory, table.title(store.plan, store.fingerprints), batches)
    text = table.report(found, store.plan, store.fingerprints, made, batches)
    (directory / "report.md").write_text(text)
    return text


def _measure(options: Options, store: Store, source: list[prompts.Request] | None, jobs: list[tuple[Point, bool]]) -> None:
    arms = {arm.name: arm for arm in options.arms}
    live = sys.stderr.isatty()
    with (
        tempfile.TemporaryDirectory(prefix="idlm-bench-") as directory,
        # Into a log file a line now and then is enough.
        tqdm(total=len(jobs), file=sys.stderr, unit="point", mininterval=0.1 if live else 30) as bar,
        _servers(options, Path(directory)) as servers,
    ):
        told: dict[str, Any] = {}
        warm: set[tuple] = set()
        if not _alone(options):
            for arm in options.arms:
                bar.set_postfix_str(f"starting {arm.name}", refresh=live)
                _told(options, store, told, servers.served(arm))
        for point, batches in jobs:
            if not _done(store, point, batches):
                what = ", one batch" if batches else ""
                bar.set_postfix_str(f"{point.arm}, C = {point.concurrency}, T = {point.temperature:g}, repeat {point.repeat + 1}{what}", refresh=live)
                served = servers.served(arms[point.arm])
                _told(options, store, told, served)
                # A server that was started again is cold again.
                load = (served.url, point.temperature, point.concurrency, batches)
                measure = one_batch.measure if batches else measure_load
                result = measure(served, point, _requests(options, source, point), options.tokenizer, load in warm, Path(directory), options.out / "load.log")
                (store.add_batches if batches else store.add)(point, result)
                warm.add(load)
            bar.update()


def _told(options: Options, store: Store, told: dict[str, Any], served: Served) -> None:
    """Check a server that is new here, and write down what it is."""
    if told.get(served.arm.name) == served.url:
        return
    check_limit(served, max(options.concurrencies))
    if options.one_batch:
        one_batch.check_template(served)
    told[served.arm.name] = served.url
    store.told({"command": options.command, "machine": fingerprint.machine(), "arm": served.arm.name, "server": fingerprint.server(served)})


def _servers(options: Options, scratch: Path) -> Servers:
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # The most concurrent load decides what every arm admits; SGLang's own defaults differ between algorithms.
    common = ("--max-running-requests", str(max(options.concurrencies)), "--enable-metrics", "--sleep-on-idle", *options.server_flags)
    model = _local(options.model) if any(_needs_files(arm) for arm in options.arms) else options.model
    return Servers(model, options.embedded, common, scratch, logs, options.start_seconds, _alone(options))


def _needs_files(arm: Arm) -> bool:
    return arm.kind == STOCK and "--dllm-algorithm" not in arm.flags


def _local(model: str) -> str:
    """A directory with the checkpoint's files: stock SGLang is given another config.json beside them."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BenchError(f"MODEL {model} cannot be fetched for the stock arm ({reason}); allowed: a directory, or a repository in reach") from None


def _alone(options: Options) -> bool:
    return accelerator_available() if options.alone is None else options.alone


def _reach(options: Options) -> None:
    """A key for the load generator, which takes it from here, and no proxy in front of our own servers."""
    if options.api_key:
        os.environ["OPENAI_API_KEY"] = options.api_key
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))


def _requests(options: Options, source: list[prompts.Request] | None, point: Point) -> list[prompts.Request]:
    body = {**options.body, "temperature": point.temperature, **(options.sampling if point.temperature else {})}
    return prompts.draw(source, options.count(point.concurrency), point.repeat, options.seed, body)


def _described(options: Options) -> dict[str, Any]:
    """What makes two runs of the command the same comparison: all but how many loads and repeats are measured."""
    path = Path(options.tokenizer)
    return {
        "checkpoint": {"name": options.tokenizer if not options.embedded else "the embedded demo checkpoint", "hash": fingerprint.checkpoint(path) if path.is_dir() else None},
        "arms": [{"name": arm.name, "kind": arm.kind, "stride": arm.stride, "flags": list(arm.flags), "url": arm.url} for arm in options.arms],
        "running_limit": max(options.concurrencies),
        "requests": options.requests,
        "per_client": options.per_client,
        "source": f"prompts of {options.prompts.name} ({fingerprint.of_file(options.prompts)})" if options.prompts else "built-in questions",
        "body": options.body,
        "sampling": options.sampling,
        "seed": options.seed,
        "server_flags": list(options.server_flags),
    }
