"""Write prometheusrule.yaml, the rules as the Prometheus operator reads them: `python deploy/prometheus/operator.py`."""

from pathlib import Path

import yaml

HERE = Path(__file__).parent


class _Readable(yaml.SafeDumper):
    """Queries of several lines stay that."""

    def ignore_aliases(self, data):
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text)


def main() -> None:
    groups = [group for path in sorted((HERE / "rules").glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]
    metadata = {"name": "idlm", "labels": {"app.kubernetes.io/name": "idlm"}}
    resource = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": metadata, "spec": {"groups": groups}}
    text = yaml.dump(resource, Dumper=_Readable, sort_keys=False, width=1000)
    (HERE / "prometheusrule.yaml").write_text(f"# Written by deploy/prometheus/operator.py from rules/.\n{text}")


if __name__ == "__main__":
    main()
