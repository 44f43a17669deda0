"""The Dockerfile's steps work, and what they leave is what the image promises.

There is no container engine in a test, so the build stage is carried out in a directory: the same context, the same
commands, a fresh virtual environment. What only an engine can do (base image, user, volume) is read.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import PREFIX, Settings
from tests.deploy.chart import objects, the
from tests.deploy.dockerfile import ROOT, Instruction, carry_out, context, inside, is_ignored, stages

BUILD, FINAL = stages((ROOT / "Dockerfile").read_text())
TOKEN = "token-of-this-test"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Carry out the build stage once."""
    source, image = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("image")
    context(source)
    carry_out(BUILD, source, image)
    return image


def container_environment(image: Path, **extra: str) -> dict[str, str]:
    """What a process of the container would find in its environment."""
    declared = {name: inside(value, image) for name, value in FINAL.pairs("ENV").items()}
    path = declared.pop("PATH").replace("$PATH", os.environ["PATH"])
    return declared | {"PATH": path} | extra


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_command_runs_from_the_installed_wheel(image: Path) -> None:
    command = [*FINAL.all("ENTRYPOINT")[0].words, "--help"]
    environment = container_environment(image)
    done = subprocess.run(command, env=environment, cwd=image, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_the_wheel_holds_the_code_and_the_bundled_policies(image: Path) -> None:
    (wheel,) = (image / "wheels").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    packages = ("service", "policies", "safety", "shadow", "surefoot")
    files = [path for package in packages for path in (ROOT / package).rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert wanted <= held
    bundles = {path.split("/")[2] for path in held if path.startswith("policies/bundles/") and path.count("/") > 2}
    assert "cartpole" in bundles
    suffixes = {Path(name).name for name in held if name.startswith("policies/bundles/cartpole/")}
    assert {"policy.yaml", "model.onnx", "golden.json"} <= suffixes
    assert not any(name.startswith(("tests/", "loadtests/", "helm/")) for name in held)


def test_the_environment_holds_the_pinned_versions_and_no_installer(image: Path) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)", "\n".join(lines), re.MULTILINE))
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    (packages,) = (image / "opt/surefoot/lib").glob("python3.*/site-packages")
    found = [re.match(r"(.+)-([^-]+)\.dist-info", path.name) for path in packages.glob("*.dist-info")]
    installed = {re.sub(r"[-_.]+", "-", each[1]).lower(): each[2] for each in found if each}
    assert installed.pop("surefoot")
    assert {name: pinned.get(name) for name in installed} == installed
    assert "pip" not in installed
    assert not {"pytest", "locust", "torch"} & set(installed)


@pytest.fixture
def running(image: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Start what the container starts, in its environment, on a free port and a data directory of its own."""
    (image / "var/lib/surefoot").mkdir(parents=True, exist_ok=True)
    (image / "tmp").mkdir(exist_ok=True)
    environment = container_environment(
        image, SUREFOOT_PORT=str(free_port()), SUREFOOT_CLIENT_TOKEN=TOKEN, SUREFOOT_ADMIN_TOKEN=TOKEN
    )
    command = [*FINAL.all("ENTRYPOINT")[0].words, *FINAL.all("CMD")[0].words]
    with (image / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=image / "tmp", stdout=log, stderr=log, text=True)
        try:
            yield process, environment
        finally:
            process.terminate()
            process.wait(timeout=60)


def become_healthy(process: subprocess.Popen[str], environment: dict[str, str], image: Path) -> None:
    """Run the image's own health check until it passes."""
    command = Instruction("CMD", FINAL.all("HEALTHCHECK")[0].text.split("CMD ", 1)[1]).words
    deadline = time.monotonic() + 60
    while subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
        assert process.poll() is None, (image / "log").read_text()
        assert time.monotonic() < deadline, (image / "log").read_text()


def test_the_container_becomes_healthy_and_drains_on_its_stop_signal(
    running: tuple[subprocess.Popen[str], dict[str, str]], image: Path
) -> None:
    process, environment = running
    become_healthy(process, environment, image)
    process.terminate()
    assert process.wait(timeout=60) == 0, (image / "log").read_text()
    assert list((image / "tmp").iterdir()) == [], "no usage statistics, no left-over: the data directory holds it all"


def test_the_smoke_test_of_the_chart_passes_with_the_token_and_only_with_it(
    running: tuple[subprocess.Popen[str], dict[str, str]], image: Path
) -> None:
    """The pod that `helm test` starts, without the pod."""
    process, environment = running
    (single,) = the("Pod", objects())["spec"]["containers"]
    target = {"TARGET_URL": f"http://127.0.0.1:{environment['SUREFOOT_PORT']}"}

    def smoke(**extra: str) -> subprocess.CompletedProcess[str]:
        variables = environment | target | extra
        return subprocess.run(single["command"], env=variables, capture_output=True, text=True, check=False)

    become_healthy(process, environment, image)
    done = smoke(TARGET_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing_field" in done.stdout
    refused = smoke(TARGET_TOKEN="another")
    assert refused.returncode != 0
    assert "unauthorized" in refused.stdout
    assert {variable["name"] for variable in single["env"]} == {"TARGET_URL", "TARGET_TOKEN"}


def test_the_container_refuses_to_be_open_to_the_network(image: Path) -> None:
    command = [*FINAL.all("ENTRYPOINT")[0].words, *FINAL.all("CMD")[0].words]
    environment = container_environment(image, SUREFOOT_PORT=str(free_port()))
    done = subprocess.run(command, env=environment, cwd=image, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "SUREFOOT_CLIENT_TOKEN" in done.stdout + done.stderr


def test_the_image_runs_as_a_user_without_rights_and_keeps_its_data_on_a_volume() -> None:
    assert [each.text for each in FINAL.all("USER")] == ["10001:10001"]
    assert [each.text for each in FINAL.all("VOLUME")] == ["/var/lib/surefoot"]
    assert [each.text for each in FINAL.all("STOPSIGNAL")] == ["SIGTERM"]
    assert FINAL.all("ENTRYPOINT")[0].words == ["surefoot"]
    assert FINAL.all("CMD")[0].words == ["serve"]
    assert FINAL.pairs("ENV")["SUREFOOT_DATA_DIR"] == "/var/lib/surefoot"
    assert [each.text for each in FINAL.all("EXPOSE")] == [FINAL.pairs("ENV")["SUREFOOT_PORT"]]
    (user,) = FINAL.all("RUN")
    assert "--uid 10001" in user.text
    assert "-o 10001 -g 10001 -m 0750 /var/lib/surefoot" in user.text


def test_both_stages_stand_on_one_slim_python_and_only_the_environment_is_carried_over() -> None:
    assert BUILD.image == FINAL.image == "python:${PYTHON}-slim"
    assert [each.text for each in FINAL.all("COPY")] == ["--from=build /opt/surefoot /opt/surefoot"]


def test_every_variable_of_the_image_is_a_real_setting() -> None:
    named = {name for name in FINAL.pairs("ENV") if name.startswith(PREFIX)}
    assert named <= {PREFIX + name.upper() for name in Settings.model_fields}


def test_labels_say_what_the_image_is() -> None:
    labels = FINAL.pairs("LABEL")
    expected = ("title", "description", "licenses", "source", "version", "revision")
    assert set(labels) == {f"org.opencontainers.image.{name}" for name in expected}
    assert {"VERSION", "REVISION"} <= set(FINAL.pairs("ARG"))


@pytest.mark.parametrize(
    "path", [".env", ".git/config", "data/aof/a", ".venv/bin/python", "tests/x.py", "service/.env.local", "a.pem"]
)
def test_the_build_context_leaves_out_what_is_not_copied(path: str) -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert is_ignored(path, [line for line in patterns if line and not line.startswith("#")])
