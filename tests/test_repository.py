"""The repository checks itself: imports go one way, pure modules stay pure, documents and code name the same things."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from service.settings import PREFIX, Settings
from tests import files_table

ROOT = Path(__file__).parent.parent
PURE_IMPORTS = {
    "__future__", "abc", "base64", "bisect", "collections", "contextlib", "dataclasses", "enum", "functools", "hashlib",
    "heapq", "hmac", "ipaddress", "itertools", "json", "math", "re", "types", "typing", "msgspec", "numpy",
}  # fmt: skip
PACKAGES = {"policies", "safety", "shadow", "service", "surefoot"}
# What a pure module may import beyond the list, and why.
ALLOWED = {
    "policies/bundle.py": {"onnx"},  # parsers of bytes
    "policies/graph.py": {"onnx", "google"},
    "policies/extent.py": {"onnx"},
    "policies/manifest.py": {"yaml"},
    "policies/continuous.py": {"scipy"},  # the normal distribution
    "policies/deployment.py": {"yaml"},
    "safety/marks.py": {"yaml"},
    "safety/expression.py": {"cel"},  # rules are written in it
    "safety/calibration_points.py": {"scipy"},
    "shadow/moments.py": {"scipy"},
    "service/rollout_plan_file.py": {"yaml"},
    "service/columns.py": {"unicodedata", "decimal"},
    "service/rollout_text.py": {"datetime"},
}


def pure_modules() -> list[str]:
    """The list that the Makefile holds coverage against."""
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(r"^PURE := (.*)$", makefile, re.MULTILINE)
    assert found
    return [str(path.relative_to(ROOT)) for pattern in found[1].split(",") for path in sorted(ROOT.glob(pattern))]


def imported(path: Path) -> set[str]:
    """Modules that a file imports when it runs; what only a type checker reads does not count."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        waiting += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("module", pure_modules())
def test_a_pure_module_imports_pure_things_only(module: str) -> None:
    pure = {name.removesuffix(".py").replace("/", ".") for name in pure_modules()}
    for name in imported(ROOT / module):
        top = name.split(".")[0]
        if top in PACKAGES:
            assert name in pure, f"{module} imports {name}"
        else:
            assert top in PURE_IMPORTS | ALLOWED.get(module, set()), f"{module} imports {name}"


def test_imports_go_one_way() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_edges_import_what_they_translate() -> None:
    edges = {
        "redis": {"service/redis_", "service/valkey.py"},
        "onnxruntime": {"policies/network.py"},
        "sqlite3": {"service/"},
    }
    for package in ("policies", "safety", "shadow", "service"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            for library, owners in edges.items():
                if any(each.split(".")[0] == library for each in imported(path)):
                    assert any(name.startswith(owner) for owner in owners), f"{name} imports {library}"


def test_every_setting_stands_in_the_operators_page_and_no_other() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    named = set(re.findall(rf"^\| `{PREFIX}([A-Z_]+)`", page, re.MULTILINE))
    assert named == {name.upper() for name in Settings.model_fields}


def test_every_metric_stands_in_the_documents_and_no_other() -> None:
    from prometheus_client import CollectorRegistry

    from service.metrics import Metrics

    registry = CollectorRegistry()
    Metrics(registry)
    exposed = {f"{m.name}_total" if m.type == "counter" else m.name for m in registry.collect()}
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(surefoot_[a-z_]+)`", page, re.MULTILINE)) == exposed


def test_every_error_code_stands_in_the_documents_and_no_other() -> None:
    from policies.errors import SurefootError

    def tree(kind: type[SurefootError]) -> list[type[SurefootError]]:
        return [kind, *(sub for child in kind.__subclasses__() for sub in tree(child))]

    page = (ROOT / "docs" / "errors.md").read_text()
    written = dict(re.findall(r"^\| `([a-z_]+)` \| (\d+) \|", page, re.MULTILINE))
    kinds = [kind for kind in tree(SurefootError) if kind.__module__ == SurefootError.__module__]
    assert written == {kind.code: str(kind.status) for kind in kinds}


def test_the_map_of_files_is_the_files() -> None:
    page = files_table.PAGE.read_text()
    assert files_table.page_with_tables(page) == page, "run `python -m tests.files_table`"


def test_the_constraints_cover_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    pinned = {re.split("[=@]", line)[0].strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {re.split(r"[\[>=<; ]", each)[0].lower().replace("_", "-") for each in wanted} - {"onnxruntime"}
    assert {name.replace("_", "-") for name in pinned} >= names


def test_alerts_are_about_metrics_that_exist() -> None:
    (group,) = yaml.safe_load((ROOT / "docs" / "alerts.yaml").read_text())["groups"]
    page = (ROOT / "docs" / "metrics.md").read_text()
    for rule in group["rules"]:
        assert {"alert", "expr", "labels", "annotations"} <= rule.keys()
        for metric in re.findall(r"surefoot_\w+", rule["expr"]):
            assert f"`{metric}`" in page, rule["alert"]
