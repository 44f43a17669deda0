"""The `surefoot safety` commands: check a policy's rules, try them on recent decisions, print the schema for editors.

Duty: read files, call one function for each command, print. Thin: it knows no rule.
Promise: exit code 0 when the rules hold, else 1 with a line `file:line:column: field: what is wrong` for each fault.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policies.errors import BundleError, SafetyError, SafetyFault

if TYPE_CHECKING:  # the process that supervises workers imports this file, and neither numpy nor CEL
    from policies.bundle import PolicyBundle
    from safety.document import RuleSet
    from service.push import Refusal

app = typer.Typer(no_args_is_help=True, help="Safety rules.")

Policy = Annotated[str, typer.Option("--policy", help="The policy whose recent decisions the rules are tried on.")]
Last = Annotated[int, typer.Option("--last", min=1, max=100_000, help="How many of its newest decisions.")]
Url = Annotated[str | None, typer.Option("--url", help="The service; without it, as the settings here say.")]
Token = Annotated[str | None, typer.Option("--token", help="Its admin token; without it, SUREFOOT_ADMIN_TOKEN.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole report, for machines.")]
Bundle = Annotated[Path | None, typer.Option(help="A version of the policy, folder or tar: do the rules fit it?")]


@app.command("check")
def check(file: Path, policy_bundle: Bundle = None) -> None:
    """Check a safety.yaml; with a bundle, also whether its rules fit that policy and spare its fallback."""
    try:
        rules = read_file(file)
        if policy_bundle is not None:
            bind_to(rules, read_bundle_at(policy_bundle), str(file))
    except SafetyError as error:
        _complain(str(file), error)
        raise typer.Exit(1) from None
    count = len(rules.rules.rules)
    fits = "" if policy_bundle is None else f", and fit {policy_bundle}"
    typer.echo(f"{file}: {count} rule{'s' * (count != 1)} for {rules.rules.policy}, {rules.digest[:12]}{fits}")


@app.command("test")
def rehearse(
    file: Path, policy: Policy, last: Last = 1_000, url: Url = None, token: Token = None, as_json: AsJson = False
) -> None:
    """Try a safety.yaml on recent decisions of a running service: what it would have changed. It changes nothing."""
    from service.push import Refusal
    from service.push import rehearse as ask

    try:
        answer = ask(policy, read_bytes(file), last, url, token)
    except Refusal as refusal:
        if not _tell_places(str(file), refusal):
            raise
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    from service.dry_run_text import text_of

    typer.echo(text_of(answer))


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of safety.yaml."""
    from safety.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def read_file(file: Path) -> RuleSet:
    """Read rules. Raises SafetyError."""
    from safety.document import read_rules

    return read_rules(read_bytes(file), str(file))


def read_bytes(file: Path) -> bytes:
    """Read a file. Raises SafetyError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise SafetyError(f"{file}: {error.strerror}; give the path of a safety.yaml") from None


def bind_to(rules: RuleSet, bundle: PolicyBundle, where: str) -> None:
    """Hold rules against a version; its golden states try them on the fallback. Raises SafetyError."""
    from safety.document import bind

    spaces = bundle.action, bundle.observation, bundle.fallback
    bind(rules, *spaces, policy=bundle.policy, sample_states=bundle.golden_states, where=where)


def read_bundle_at(path: Path) -> PolicyBundle:
    """Read a bundle without running its network. Raises BundleError."""
    from policies.archive import read_folder_files, read_tar_files
    from policies.bundle import read_bundle

    if path.is_dir():
        return read_bundle(read_folder_files(path))
    try:
        return read_bundle(read_tar_files(path.read_bytes()))
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}", "policy-bundle", "files") from None


def _tell_places(where: str, refusal: Refusal) -> bool:
    """Tell the faults that a service has found in the file; False where it has refused something else."""
    from safety.marks import line_of

    errors = refusal.problem.get("errors") or []
    faults = [SafetyFault(**each) for each in errors if each.get("line")]
    for fault in faults:
        typer.echo(line_of(where, fault), err=True)
    return bool(faults)


def _complain(where: str, error: SafetyError) -> None:
    from safety.marks import line_of

    lines = [line_of(where, fault) for fault in error.errors] or [error.detail]
    for line in lines:
        typer.echo(line, err=True)
