"""docs/deploy.md names what exists: values with their defaults and meanings, settings, metrics and options."""

from __future__ import annotations

import re

import helm_python as helm
import yaml

from service.settings import PREFIX, Settings
from tests.deploy.chart import ROOT, chart, environment, manifests, objects
from tests.deploy.values_table import PAGE, leaves, meanings, page_with_table

TEXT = PAGE.read_text()


def test_the_table_of_values_is_the_one_in_the_chart() -> None:
    assert page_with_table(TEXT) == TEXT, "run `python -m tests.deploy.values_table`"


def test_every_value_has_a_meaning() -> None:
    known = meanings((ROOT / "helm" / "values.yaml").read_text())
    assert [path for path, _ in leaves(chart().values) if not known.get(path)] == []


def test_every_value_named_in_the_text_exists() -> None:
    paths = {path for path, _ in leaves(chart().values)}
    tops = {path.split(".")[0] for path in paths}
    named = {name for name in re.findall(r"`([a-z]\w*(?:\.\w+)+)[`:]", TEXT) if name.split(".")[0] in tops}
    assert named
    assert named - {"tls.crt", "tls.key"} <= paths, "these two are keys of a Secret"


def test_every_setting_named_is_a_real_one() -> None:
    assert set(re.findall(r"SUREFOOT_[A-Z_]+", TEXT)) <= {PREFIX + name.upper() for name in Settings.model_fields} | {
        PREFIX
    }


def test_the_example_values_render() -> None:
    (example,) = re.findall(r"```yaml\n(# production\.yaml\n.*?)```", TEXT, re.DOTALL)
    values = yaml.safe_load(example)
    assert environment(objects(values))["SUREFOOT_REDIS_URL"] is None, "held by a Secret outside the chart"
    assert helm.lint(ROOT / "helm", values, strict=True)["errors"] == []
    assert "prometheusrule.yaml" in manifests(values)
