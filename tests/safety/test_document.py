"""What a `safety.yaml` may hold: every fault is told with its line and column; the schema and the page agree."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import SafetyError, SafetyFault
from safety.document import KINDS, bind, read_rules
from safety.marks import MAX_BYTES, Complaint, line_of, read_yaml
from safety.schema import json_schema
from tests.safety.policies_of_the_page import FITTING, LOAD, SPACES, rest

DOCS = Path(__file__).parents[2] / "docs"
HEAD = "schema: 1\npolicy: autoscaler\nrules:\n"


def faults(raw: str | bytes) -> list[SafetyFault]:
    """What is wrong with a document; nothing, where it is read."""
    try:
        read_rules(raw if isinstance(raw, bytes) else raw.encode())
    except SafetyError as error:
        return list(error.errors)
    return []


def places(raw: str | bytes) -> list[tuple[str, int, int]]:
    return [(fault.field, fault.line, fault.column) for fault in faults(raw)]


# Reading


def test_a_document_becomes_rules_and_a_digest_of_what_it_says() -> None:
    one = read_rules(b"schema: 1\npolicy: a\nrules:\n- {kind: rate, name: r, actions: [x], limit: 1, window_s: 2}\n")
    two = read_rules(
        b"# why\npolicy: 'a'\nrules:\n  - kind: rate\n    limit: 1\n    window_s: 2 # s\n    actions:\n      - x\n"
        b"    name: r\nschema: 1\n"
    )
    other = read_rules(b"schema: 1\npolicy: a\nrules:\n- {kind: rate, name: r, actions: [x], limit: 2, window_s: 2}\n")
    assert one.rules == two.rules
    assert one.digest == two.digest != other.digest
    assert re.fullmatch("[0-9a-f]{64}", one.digest)
    assert read_rules(one.source) == one
    with pytest.raises(AttributeError):
        one.digest = ""  # type: ignore[misc]


@given(st.permutations(["schema: 1", "policy: a", "description: d", "on_empty: baseline"]))
def test_the_order_of_keys_does_not_matter(lines: list[str]) -> None:
    assert read_rules("\n".join(lines).encode()).digest == read_rules("\n".join(sorted(lines)).encode()).digest


def test_every_fault_is_told_at_once_in_the_order_of_the_file() -> None:
    found = places(
        "schema: 1\n"
        "policy: autoscaler\n"
        "on_empty: nobody\n"
        "rules:\n"
        "  - kind: rate\n"
        "    name: a\n"
        "    actions: [1]\n"
        "    limit: 0\n"
        "    window_s: 60\n"
        "  - {kind: cost, name: b, costs: {up: 1, down: -2}, cap: 3, window_s: 1}\n"
        "  - {name: c}\n"
        "  - {kind: cooldown, name: d, actions: [x], seconds: 1, limt: 2}\n"
        "  - {kind: ratio, name: e}\n"
        "  - 7\n"
    )
    assert found == [
        ("on_empty", 3, 11),
        ("rules[0].limit", 8, 12),
        ("rules[1].costs.down", 10, 48),
        ("rules[2].kind", 11, 5),
        ("rules[3].limt", 12, 57),
        ("rules[4].kind", 13, 12),
        ("rules[5]", 14, 5),
    ]


@pytest.mark.parametrize(
    ("rule", "field", "words"),
    [
        ("{kind: rate, name: a, actions: [x], limit: 0, window_s: 1}", "limit", ">= 1, the file says 0"),
        ("{kind: rate, name: a, actions: [], limit: 1, window_s: 1}", "actions", "length >= 1"),
        ("{kind: rate, name: a, actions: [x, 1.5], limit: 1, window_s: 1}", "actions[1]", "the file says 1.5"),
        ("{kind: rate, name: a, actions: [x], window_s: 1}", "limit", "missing; add it"),
        ("{name: a}", "kind", "missing; add it; known: forbid, bounds"),
        ("{kind: [1], name: a}", "kind", "known: forbid, bounds"),
        ("{kind: rat, name: a}", "kind", "known: forbid, bounds"),
        ("{kind: cooldown, name: a, actions: [x], seconds: 1, scope: here}", "scope", "known: shared, strict, local"),
        ("{kind: support, name: a, by: eye}", "by", "known: range, quantiles"),
        ("{kind: support, name: a, mode: off-duty}", "mode", "known: enforce, monitor"),
        ("{kind: support, name: a, bye: 1}", "bye", "known: kind, name, reason"),
        ("{kind: max_step, name: a, limit: 1, values: {x: 1, y: z}}", "values.y", 'the file says "z"'),
        ("{kind: support, name: 'a b'}", "name", "matching regex"),
        ('{kind: support, name: "a\\n"}', "name", "matching regex"),
        (f"{{kind: support, name: a, by: {'x' * 99}}}", "by", "…"),
        ("{kind: support, name: request}", "name", "allowed_actions"),
        ("{kind: support, name: s}\n- {kind: support, name: s}", "name", "rules[0] is called 's' already"),
    ],
)
def test_a_field_that_is_wrong_is_named_with_what_to_write(rule: str, field: str, words: str) -> None:
    (found,) = faults(f"{HEAD}- {rule}\n")
    assert found.field.partition("].")[2] == field
    assert words in found.detail


@pytest.mark.parametrize(
    ("raw", "place", "words"),
    [
        ("", ("", 1, 1), "empty"),
        ("# only a comment\n", ("", 1, 1), "empty"),
        ("- 1", ("", 1, 1), "write `schema: 1` first"),
        ("schema: 1\npolicy: a\nrules: 3", ("rules", 3, 8), "the file says 3"),
        ("schema: 2\npolicy: a", ("schema", 1, 9), "known: 1"),
        ("schema: 1", ("policy", 1, 1), "missing"),
        ("schema: 1\npolicy: a\nrule: []", ("rule", 3, 1), "known: schema, policy, on_empty, rules, description"),
        ("schema: 1\npolicy: [", ("", 2, 10), "not YAML"),
        ("schema: 1\n---\npolicy: a", ("", 2, 1), "single document"),
        ("a: &x 1\nb: *x", ("", 2, 4), "aliases are refused; write the value out"),
        ("[" * 40, ("", 1, 17), "16 levels"),
        ("schema: 1\nschema: 1", ("schema", 2, 1), "stands already in line 1"),
        ("x: {<<: {schema: 1}}", ("x.<<", 1, 5), "merge keys are refused"),
        ("1: 2", ("1", 1, 1), 'write it in quotes: "1"'),
        ("? [a]\n: b", ("?", 1, 3), "keys are text"),
        ('"\\ud800": 1', ("?", 1, 1), "keys are text"),
        ("policy: off", ("policy", 1, 9), '"off" in quotes'),
        ("policy: 2024-01-01", ("policy", 1, 9), '"2024-01-01"'),
        ("schema: 010", ("schema", 1, 9), "not a finite decimal number"),
        ("schema: 1:30", ("schema", 1, 9), "not a finite decimal number"),
        ("schema: .nan", ("schema", 1, 9), "not a finite decimal number"),
        ("schema: 1.0e+999", ("schema", 1, 9), "too large"),
        ("schema: 9999999999999999", ("schema", 1, 9), "read exactly"),
        (f"schema: {'9' * 5000}", ("schema", 1, 9), "read exactly"),
        ("schema: !!int one", ("schema", 1, 9), "not a finite decimal number"),
        ("schema: !!binary aa", ("schema", 1, 9), "without a tag"),
        ("schema: !!set {a}", ("schema", 1, 9), "without a tag"),
        ("schema: !!int [1]", ("schema", 1, 9), "without a tag"),
        ('policy: "\\ud800"', ("policy", 1, 9), "neither text"),
        ('policy: "\\U00110000"', ("", 1, 12), "no character"),
        ("schema: 1\npolicy: a\0", ("", 2, 10), "0x0"),
        (b"schema: 1\npolicy: \xff", ("", 2, 9), "UTF-8"),
        (b"\xef\xbb\xbfschema: on", ("schema", 1, 9), "boolean"),
        (" " * (MAX_BYTES + 1), ("", 1, 1), f"the cap is {MAX_BYTES}"),
    ],
)
def test_what_is_no_document_is_refused_where_it_goes_wrong(
    raw: str | bytes, place: tuple[str, int, int], words: str
) -> None:
    found = faults(raw)
    assert place in [(fault.field, fault.line, fault.column) for fault in found]
    assert any(words in fault.detail for fault in found)


def test_numbers_are_read_as_all_versions_of_yaml_read_them() -> None:
    raw = b"[1, -2, +3, 0, 1.5, .5, 1., 1e3, 1.0E-2, '1e3', true, FALSE, null, ~, '', x]"
    read = read_yaml(raw, "f").value
    assert read == [1, -2, 3, 0, 1.5, 0.5, 1.0, 1000.0, 0.01, "1e3", True, False, None, None, "", "x"]
    assert read_yaml(b"a:\n", "f").value == {"a": None}


def test_an_error_reads_like_a_compilers() -> None:
    with pytest.raises(SafetyError) as caught:
        read_rules(b"schema: 2\npolicy: 3\nx: on", "rules/safety.yaml")
    assert caught.value.detail.startswith("rules/safety.yaml:3:4: x: YAML reads on as a boolean")
    with pytest.raises(SafetyError, match=r"^s.yaml:1:9: schema: .* \(and 1 more\)$"):
        read_rules(b"schema: 2\nrules: [{kind: support}]\npolicy: a", "s.yaml")
    assert line_of("f", SafetyFault("", "d", 1, 2)) == "f:1:2: d"
    assert caught.value.field == "x"
    assert (caught.value.code, caught.value.status) == ("invalid_safety", 422)
    assert SafetyError("d", "f").within("rows[0]").field == "rows[0].f"


def test_a_path_that_does_not_stand_in_the_file_is_shown_where_it_is_missing() -> None:
    document = read_yaml(b"a:\n  - b: 1\n", "f")
    paths = [("a", 0, "c"), ("a", 0, "b"), ("z",)]
    error = document.refusal([Complaint(path, "d", key=path != ("a", 0, "b")) for path in paths])
    assert [(fault.field, fault.line, fault.column) for fault in error.errors] == [
        ("z", 1, 1),
        ("a[0].c", 2, 5),
        ("a[0].b", 2, 8),
    ]


PIECES = [
    "a",
    ": ",
    "- ",
    "\n",
    "  ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "'",
    '"',
    "\\x",
    "\\U",
    "|",
    ">",
    "&",
    "*",
    "!",
    "!!int ",
]
PIECES += [
    "%YAML ",
    "1",
    "?",
    "#",
    "\t",
    "<<",
    "---",
    "...",
    "%41",
    "schema: 1\n",
    "policy: a\n",
    "rules:\n",
    "kind: rate",
]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join) | st.text(max_size=40) | st.binary(max_size=40))
def test_whatever_the_bytes_are_they_are_read_or_refused(raw: str | bytes) -> None:
    data = raw if isinstance(raw, bytes) else raw.encode(errors="surrogatepass")
    lines = data.decode(errors="replace").splitlines() or [""]
    for fault in faults(data):
        assert 1 <= fault.line <= len(lines) + 1
        assert fault.column >= 1
        json.dumps(fault.field).encode()


# Expressions


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("state.cpu >", "this is not CEL: Syntax error: mismatched input '<EOF>', line 1, column 12"),
        ("[", "line 1, column 2"),
        ("sate.cpu > 1.0", "there is no 'sate'; an expression reads action, context, state"),
        ("state.cpu > 1.0 && key == 'a'", "there is no 'key'"),
        ("state.`a b` > 1.0", "this is not CEL: unsupported syntax"),
    ],
)
def test_an_expression_that_means_nothing_is_a_fault_of_the_file(when: str, words: str) -> None:
    (found,) = faults(f"{HEAD}- kind: forbid\n  name: a\n  when: {json.dumps(when)}\n")
    assert (found.field, found.line, found.column) == ("rules[0].when", 6, 9)
    assert words in found.detail
    assert "\n" not in found.detail


@pytest.mark.parametrize("when", ["[1, 2].all(i, i > 0)", "type(context.a) == string", "true", "has(state.cpu)"])
def test_variables_of_macros_and_types_are_known(when: str) -> None:
    assert faults(f"{HEAD}- {{kind: forbid, name: a, when: {json.dumps(when)}}}") == []


# The schema and the page


def test_the_committed_schema_is_the_one_of_the_code() -> None:
    assert json.loads((DOCS / "safety.schema.json").read_text()) == json_schema(), (
        "run: surefoot safety schema > docs/safety.schema.json"
    )


def test_the_schema_explains_every_kind_and_refuses_other_fields() -> None:
    definitions = json_schema()["$defs"]
    assert len(definitions) == len(KINDS) + 1
    for definition in definitions.values():
        assert definition["description"]
        assert definition["additionalProperties"] is False
    assert definitions["MaxStep"]["properties"]["mode"]["description"].startswith("a rule that monitors")
    assert definitions["Support"]["properties"]["margin"]["description"].startswith("by how much")


JUDGED = [
    {"schema": 1, "policy": "a"},
    {"schema": 1, "policy": "a", "on_empty": "baseline", "rules": [], "description": "d"},
    *({"schema": 1, "policy": "a", "rules": [{"name": "r", **rule}]} for _, rule in FITTING),
    {},
    [],
    {"schema": 2, "policy": "a"},
    {"schema": 1, "policy": "a b"},
    {"schema": 1, "policy": "a\n"},
    {"schema": 1, "policy": "a", "on_empty": "x"},
    {"schema": 1, "policy": "a", "rule": []},
    {"schema": 1, "policy": "a", "rules": [{"kind": "forbid", "name": "r"}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "forbid", "name": "r", "when": ""}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "forbidden", "name": "r", "when": "true"}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "rate", "name": "r", "actions": [], "limit": 1, "window_s": 1}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "rate", "name": "r", "actions": [1], "limit": 0, "window_s": 1}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "rate", "name": "r", "actions": [1], "limit": 1, "window_s": 0}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "cost", "name": "r", "costs": {}, "cap": 1, "window_s": 1}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "cost", "name": "r", "costs": {"a": -1}, "cap": 1, "window_s": 1}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "max_step", "name": "r", "limit": 1, "values": {"a": "b"}}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "max_step", "name": "r", "limit": 1, "scope": "strict"}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "support", "name": "r", "margin": True}]},
    {"schema": 1, "policy": "a", "rules": [{"kind": "support", "name": "r", "reason": None}]},
]


@pytest.mark.parametrize("document", JUDGED)
def test_the_schema_judges_as_the_reader_does(document: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(validator.schema)
    assert validator.is_valid(document) == (faults(json.dumps(document)) == [])


def blocks() -> list[str]:
    """The YAML of the page on rules."""
    page = (DOCS / "safety-rules.md").read_text()
    return re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks())
def test_every_example_of_the_page_is_read_and_fits_the_policy_it_is_for(block: str) -> None:
    for policy, action in SPACES.items():
        raw = block if block.startswith("#") else f"schema: 1\npolicy: {policy}\nrules:\n{block}"
        rules = read_rules(raw.encode())
        try:
            bind(rules, action, LOAD, rest(action))
        except SafetyError:
            continue
        return
    raise AssertionError("the example fits none of the page's policies")


def test_the_page_shows_every_kind_and_no_other() -> None:
    page = (DOCS / "safety-rules.md").read_text()
    shown = [yaml.safe_load(block) for block in blocks()]
    rules = chain.from_iterable(each["rules"] if isinstance(each, dict) else each for each in shown)
    assert {rule["kind"] for rule in rules} == set(KINDS)
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert {kind for heading in headings for kind in heading.split(", ")} == set(KINDS)
