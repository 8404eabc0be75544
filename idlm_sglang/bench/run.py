"""The order of a comparison: start the arms, measure in turn, write what came out."""

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from idlm_sglang.bench import fingerprint, prompts
from idlm_sglang.bench.load import Point, measure
from idlm_sglang.bench.options import Options
from idlm_sglang.bench.servers import Served, Servers, check_limits
from idlm_sglang.bench.store import Store
from idlm_sglang.bench.summary import cells


def run(options: Options) -> int:
    """Measure what is not measured yet, write table and plots into ``options.out``, print the table. Returns the exit code.

    Raises:
        BenchError, SettingError: what was measured so far stays in ``options.out``.
    """
    store = Store(options.out)
    source = prompts.read(options.prompts) if options.prompts else None
    points = plan(options)
    with tempfile.TemporaryDirectory(prefix="idlm-bench-") as directory:
        scratch = Path(directory)
        # The most concurrent load decides what every arm admits; SGLang's own defaults differ between algorithms.
        common = ("--max-running-requests", str(max(options.concurrencies)), "--enable-metrics", "--sleep-on-idle", *options.server_flags)
        with Servers(options.model, options.embedded, common, scratch, _logs(options.out), options.start_seconds) as servers:
            # Into a log file a line now and then is enough.
            live = sys.stderr.isatty()
            bar = tqdm(total=len(points), file=sys.stderr, unit="point", mininterval=0.1 if live else 30)
            served: dict[str, Served] = {}
            for arm in options.arms:
                bar.set_postfix_str(f"starting {arm.name}", refresh=live)
                served[arm.name] = servers.start(arm)
            check_limits(list(served.values()), max(options.concurrencies))
            arms = {name: fingerprint.server(one) for name, one in served.items()}
            store.begin(_described(options), {"command": options.command, "machine": fingerprint.machine(), "arms": arms})
            warm: set[tuple] = set()
            for point in points:
                if point not in store.results:
                    bar.set_postfix_str(f"{point.arm}, C = {point.concurrency}, T = {point.temperature:g}, repeat {point.repeat + 1}", refresh=live)
                    wanted = _requests(options, source, point)
                    load = (point.arm, point.temperature, point.concurrency)
                    store.add(point, measure(served[point.arm], point, wanted, options.tokenizer, load in warm, scratch, options.out / "load.log"))
                    warm.add(load)
                bar.update()
            bar.close()
    print(write(options.out, store))
    print(f"idlm: results in {options.out}")
    return 0


def plan(options: Options) -> list[Point]:
    """Every point, so that the arms alternate: drift of the machine meets all of them. Each repeat begins with another arm."""
    names = [arm.name for arm in options.arms]
    found = []
    for temperature, concurrency, repeat in itertools.product(options.temperatures, options.concurrencies, range(options.repeats)):
        first = repeat % len(names)
        found += [Point(name, temperature, concurrency, repeat) for name in names[first:] + names[:first]]
    return found


def write(directory: Path, store: Store) -> str:
    """Table and plots of the results so far; the table as text."""
    from idlm_sglang.bench import plots, table

    found = cells(store.results, [arm["name"] for arm in store.plan["arms"]])
    made = plots.draw(found, directory, f"{store.plan['checkpoint']['name']} on {store.fingerprints[-1]['machine']['device']}")
    text = table.report(found, store.plan, store.fingerprints, made)
    (directory / "report.md").write_text(text)
    return text


def _requests(options: Options, source: list[prompts.Request] | None, point: Point) -> list[prompts.Request]:
    body = {**options.body, "temperature": point.temperature, **(options.sampling if point.temperature else {})}
    return prompts.draw(source, options.count(point.concurrency), point.repeat, options.seed, body)


def _described(options: Options) -> dict[str, Any]:
    """What makes two runs of the command the same comparison."""
    path = Path(options.tokenizer)
    return {
        "checkpoint": {"name": "the embedded demo checkpoint" if options.embedded else options.model, "hash": fingerprint.checkpoint(path) if path.is_dir() else None},
        "arms": [{"name": arm.name, "kind": arm.kind, "stride": arm.stride, "flags": list(arm.flags), "url": arm.url} for arm in options.arms],
        "concurrencies": list(options.concurrencies),
        "temperatures": list(options.temperatures),
        "repeats": options.repeats,
        "requests": options.requests,
        "per_client": options.per_client,
        "source": f"prompts of {options.prompts.name} ({fingerprint.of_file(options.prompts)})" if options.prompts else "built-in questions",
        "body": options.body,
        "sampling": options.sampling,
        "seed": options.seed,
        "server_flags": list(options.server_flags),
    }


def _logs(out: Path) -> Path:
    found = out / "logs"
    found.mkdir(parents=True, exist_ok=True)
    return found
