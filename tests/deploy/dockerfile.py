"""Reads the Dockerfile, and carries out a stage of it in a directory, as far as that needs no container engine.

It knows the instructions that this repository's Dockerfile uses, and refuses others, so that a step it cannot carry
out is noticed. Paths at the root of the image become paths below a directory of the test's own; base images are not
fetched: their Python is the one that runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGE_PATH = re.compile(r"(?<![\w./}])/(?=(?:src|wheels|opt|root|var|tmp)\b)")


@dataclass(frozen=True, slots=True)
class Instruction:
    word: str
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments without options; an exec form is a JSON array."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return [word for word in self.text.split() if not word.startswith("--")]


@dataclass(slots=True)
class Stage:
    image: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, word: str) -> list[Instruction]:
        return [each for each in self.instructions if each.word == word]

    def pairs(self, word: str) -> dict[str, str]:
        """Read NAME=value pairs of ENV, LABEL or ARG."""
        found = [re.findall(r'([\w.]+)=("[^"]*"|\S*)', each.text) for each in self.all(word)]
        return {name: value.strip('"') for pairs in found for name, value in pairs}


def instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def stages(text: str) -> list[Stage]:
    found: list[Stage] = []
    for each in instructions(text):
        if each.word == "FROM":
            image, *name = each.words
            found.append(Stage(image, name[-1] if name else ""))
        elif found:
            found[-1].instructions.append(each)
    return found


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Tell whether the build context leaves a file out: the last pattern that matches it or a folder above decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    ignored = False
    for pattern in patterns:
        plain = pattern.removeprefix("!").rstrip("/")
        names = parts if plain.startswith("**/") else prefixes
        if any(fnmatch(name, plain.removeprefix("**/")) for name in names):
            ignored = not pattern.startswith("!")
    return ignored


def context(destination: Path) -> None:
    """Copy what the build context would hold."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    tops = [entry for entry in ROOT.iterdir() if not is_ignored(entry.name, patterns)]
    files = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    for path in files:
        name = path.relative_to(ROOT)
        if not is_ignored(name.as_posix(), patterns):
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination / name)


def inside(text: str, image: Path) -> str:
    """Turn absolute paths of the image into paths below `image`."""
    return IMAGE_PATH.sub(f"{image}/", text)


def carry_out(stage: Stage, source: Path, image: Path) -> None:
    """Carry out WORKDIR, COPY and RUN of a stage, in order. Raises when a step fails or is of another kind."""
    folder = image
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SUREFOOT_", "VIRTUAL_ENV"))
    }
    environment |= stage.pairs("ARG") | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for each in stage.instructions:
        if each.word == "WORKDIR":
            folder = Path(inside(each.text, image))
            folder.mkdir(parents=True)
        elif each.word == "COPY":
            *names, target = each.words
            for name in names:
                _copy(source / name, folder / target, into=target.endswith("/"))
        elif each.word == "RUN":
            command = inside(re.sub(r"--mount=\S+", "", each.text), image)
            done = subprocess.run(
                ["/bin/sh", "-e", "-c", command],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
        else:
            assert each.word == "ARG", f"{each.word} is not known here"


def _copy(path: Path, target: Path, into: bool) -> None:
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, target / path.name if into else target)
