"""Rules and dashboard: valid, and every alert fires for its fault and for nothing else."""

import re

import pytest
import yaml

from tests.deploy.tools import DEPLOY, ROOT, RULES, dashboard_queries, groups, panels, passes, queries, rules, run, thorough

CASES = sorted((ROOT / "tests" / "deploy" / "rules").glob("*.yaml"))


def test_promtool_accepts_configuration_and_rules():
    passes("promtool", "check", "config", "deploy/prometheus/prometheus.yml")
    passes("promtool", "check", "rules", *RULES)


def test_every_scrape_gives_the_series_their_names_whatever_format_was_asked_for():
    """test_watched.py shows what it does in a real Prometheus; here that no scrape is without."""
    rule = {"regex": "(idlm|sglang)_(.+)", "replacement": "${1}:${2}"}
    for name in ("prometheus.yml", "compose.yml"):
        (job,) = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["scrape_configs"]
        assert job["metric_relabel_configs"] == [rule | {"source_labels": ["__name__"], "target_label": "__name__"}], name
    monitor = next(yaml.safe_load_all((DEPLOY / "kubernetes/components/monitoring/podmonitor.yaml").read_text()))
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["metricRelabelings"] == [rule | {"sourceLabels": ["__name__"], "targetLabel": "__name__"}]


def test_every_rule_gives_what_its_cases_say():
    print(passes("promtool", "test", "rules", *CASES))


@thorough
@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_the_cases_notice_when_a_rule_is_gone(rule, tmp_path):
    """A rule without a case that depends on it would pass whatever it said."""
    left = [{**group, "rules": [r for r in group["rules"] if r != rule]} for group in groups()]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": left}))
    for path in CASES:
        case = yaml.safe_load(path.read_text()) | {"rule_files": ["rules.yaml"]}
        (tmp_path / path.name).write_text(yaml.safe_dump(case))
    done = run("promtool", "test", "rules", *(tmp_path / path.name for path in CASES))
    assert done.returncode != 0, "no case depends on it"


def test_every_alert_says_how_bad_and_what():
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule
            assert rule["annotations"]["summary"], rule


def test_promtool_can_read_every_query_of_dashboard_and_autoscaler(tmp_path):
    """promtool of Debian 12 reads expressions only in rules."""
    asked = [{"record": "asked", "labels": {"at": name}, "expr": text} for name, text in queries().items()]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))
    passes("promtool", "check", "rules", tmp_path / "asked.yaml")


def test_what_is_read_as_recorded_is_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    read = {name for text in queries().values() for name in re.findall(r"\bmodel\w*:\w+:\w+", text)}
    assert read and read <= recorded


def test_the_dashboard_shows_every_panel_once_and_none_over_another():
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    taken = set()
    for panel in found:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in found for target in panel.get("targets", []))
    print(f"{len(dashboard_queries())} queries in {len(found)} panels and rows")


def test_the_rules_of_the_operator_are_those_of_prometheus():
    """`python deploy/prometheus/operator.py` writes them."""
    resource = yaml.safe_load((DEPLOY / "prometheus" / "prometheusrule.yaml").read_text())
    assert resource["kind"] == "PrometheusRule" and resource["spec"]["groups"] == groups()
