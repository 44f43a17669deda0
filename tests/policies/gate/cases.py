"""Every way of being refused, as files on disk: a folder or a tar for each, the check that must refuse it, and how."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx

from policies.archive import read_folder_files, read_tar_files
from policies.bundle import MAX_MODEL_BYTES, PolicyBundle
from policies.confine import Limits
from policies.trial import try_bundle
from tests.policies.gate import hostile
from tests.policies.networks import bundle_files, identity_files, linear, logarithm

Files = dict[str, bytes]
STATES = [[0.0, 1.0], [2.0, 3.0]]
ZEROS = [[0.0, 0.0], [0.0, 0.0]]
# Short, so that loops without an end end soon.
TIGHT = Limits(cpu_s=2, wall_s=60.0)
HURRIED = Limits(cpu_s=60, wall_s=2.0)


@dataclass(frozen=True)
class Case:
    """One fixture. make: writes it below a folder and gives its path. mend: what the refusal must advise."""

    name: str
    make: Callable[[Path], Path]
    check: str
    mend: str
    limits: Limits = TIGHT


def admit(path: Path, limits: Limits = TIGHT, cache: Path | None = None) -> PolicyBundle:
    """Take a bundle in as a service would, from a folder or a tar."""
    files = read_folder_files(path) if path.is_dir() else read_tar_files(path.read_bytes())
    return try_bundle(files, limits, cache)


def on_disk(files: Mapping[str, bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    return make


def around(model: bytes | onnx.ModelProto, outputs: list[list[float]] = STATES, **changes: Any) -> Files:
    """A bundle around a network, whatever it is; its manifest and its digest fit."""
    content = model if isinstance(model, bytes) else model.SerializeToString()
    files = bundle_files(linear([[1, 0], [0, 1]]), STATES, outputs, **changes)
    placed = sha256(files["model.onnx"]).hexdigest().encode()
    manifest = files["policy.yaml"].replace(placed, sha256(content).hexdigest().encode())
    return files | {"model.onnx": content, "policy.yaml": manifest}


def _changed(change: hostile.Change) -> Callable[[Path], Path]:
    return on_disk(around(hostile.identity(change)))


def _without_model(folder: Path) -> Path:
    on_disk(identity_files())(folder)
    (folder / "model.onnx").unlink()
    return folder


def _symlinked(folder: Path) -> Path:
    outside = folder.parent / "outside.onnx"
    outside.write_bytes(identity_files()["model.onnx"])
    (_without_model(folder) / "model.onnx").symlink_to(outside)
    return folder


def _hardlinked(folder: Path) -> Path:
    outside = folder.parent / "outside.onnx"
    outside.write_bytes(identity_files()["model.onnx"])
    (_without_model(folder) / "model.onnx").hardlink_to(outside)
    return folder


def _piped(folder: Path) -> Path:
    os.mkfifo(_without_model(folder) / "model.onnx")
    return folder


def _weights_by_symlink(folder: Path) -> Path:
    (folder / "weights.bin").symlink_to("/etc/passwd")
    return _changed(hostile.beside)(folder)


def _weights_by_hardlink(folder: Path) -> Path:
    (folder.parent / "secret").write_bytes(bytes(16))
    (folder / "weights.bin").hardlink_to(folder.parent / "secret")
    return _changed(hostile.beside)(folder)


def _too_large(folder: Path) -> Path:
    os.truncate(on_disk(identity_files())(folder) / "model.onnx", MAX_MODEL_BYTES + 1)
    return folder


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def packed(*members: tuple[Any, bytes], mode: Any = "w") -> bytes:
    """A tar of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def plain(**more: bytes) -> list[tuple[Any, bytes]]:
    return [member(name, content) for name, content in (identity_files() | more).items()]


def below(path: str) -> list[tuple[Any, bytes]]:
    """The members of a good bundle, at another place."""
    return [member(f"{path}{name}", content) for name, content in identity_files().items()]


def tar(*odd: tuple[Any, bytes], mode: Any = "w") -> Callable[[Path], Path]:
    """A tar of a good bundle with odd members besides."""
    return archive(packed(*odd, *plain(), mode=mode))


def archive(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "bundle.tar"
        path.write_bytes(content)
        return path

    return make


def bomb() -> bytes:
    """A gzip whose few bytes stand for a tar over every cap."""
    import gzip

    header = tarfile.TarInfo("model.onnx")
    header.size = 1 << 30
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(header.tobuf())
        for _ in range(512):
            file.write(bytes(1 << 20))
    return buffer.getvalue()


def _golden(states: object, outputs: object) -> dict[str, bytes]:
    return {"golden.json": json.dumps({"states": states, "outputs": outputs}).encode()}


def _cut() -> Files:
    model = identity_files()["model.onnx"]
    return around(model[: len(model) // 2])


EXTERNAL = [
    hostile.traversal, hostile.memory_address, hostile.entries_only, hostile.in_sparse_values,
    hostile.in_sparse_indices, hostile.in_an_attribute, hostile.in_a_list_of_tensors, hostile.in_a_sparse_attribute,
    hostile.in_a_subgraph, hostile.in_a_function, hostile.in_a_functions_subgraph, hostile.in_a_functions_default,
    hostile.in_a_graph_of_a_functions_default, hostile.in_training_info,
]  # fmt: skip
OPERATORS = [
    hostile.foreign_node, hostile.foreign_import, hostile.foreign_in_a_function, hostile.foreign_import_of_a_function,
    hostile.foreign_in_a_subgraph, hostile.ep_context,
]  # fmt: skip
TARS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "symlink": (archive(packed(member("model.onnx", kind=tarfile.SYMTYPE, link="/etc/passwd"))), "links"),
    "hardlink": (archive(packed(member("model.onnx", kind=tarfile.LNKTYPE, link="policy.yaml"))), "links"),
    "device": (archive(packed(member("model.onnx", kind=tarfile.CHRTYPE))), "archive"),
    "pipe": (archive(packed(member("model.onnx", kind=tarfile.FIFOTYPE))), "archive"),
    "sparse": (archive(packed(member("model.onnx", kind=tarfile.GNUTYPE_SPARSE))), "archive"),
    "absolute": (archive(packed(*below("/"))), "archive"),
    "parent": (archive(packed(*below("../"))), "archive"),
    "parent_of_a_folder": (archive(packed(*below("v1/../../"))), "archive"),
    "backslash": (archive(packed(*below("..\\"))), "archive"),
    "deep": (tar(member("a/b/policy.yaml", b"x")), "archive"),
    "other": (tar(member("README.md", b"x")), "archive"),
    "twice": (tar(member("golden.json", b"{}")), "archive"),
    "two_folders": (tar(member("v1/golden.json", b"{}")), "archive"),
    "parent_in_pax": (tar(member(f"{'a' * 120}/../policy.yaml", b"x")), "archive"),
    "lzma": (tar(mode="w:xz"), "archive"),
    "no_tar": (archive(b"policy: toy\n" * 100), "archive"),
    "empty": (archive(b""), "archive"),
    "cut": (archive(packed(*plain())[:1024]), "archive"),
    "cut_gzip": (archive(packed(*plain(), mode="w:gz")[:-20]), "archive"),
    "damaged": (archive(packed(*plain()).replace(b"policy.yaml", b"policy.yamm", 1)), "archive"),
    "bomb": (archive(bomb()), "size"),
}
CASES = [
    *(Case(f"external_{change.__name__}", _changed(change), "external_data", "one file") for change in EXTERNAL),
    Case("external_by_symlink", _weights_by_symlink, "external_data", "one file"),
    Case("external_by_hardlink", _weights_by_hardlink, "external_data", "one file"),
    *(Case(f"operators_{change.__name__}", _changed(change), "operators", "export") for change in OPERATORS),
    *(Case(f"tar_{name}", make, check, "") for name, (make, check) in TARS.items()),
    Case("symlinked_model", _symlinked, "links", "plain copy"),
    Case("hardlinked_model", _hardlinked, "links", "plain copy"),
    Case("piped_model", _piped, "links", "plain copy"),
    Case("no_model", _without_model, "files", "a bundle has"),
    Case("over_the_cap", _too_large, "size", "export a smaller"),
    Case("manifest", on_disk(identity_files(head="magic")), "manifest", ""),
    Case("digest", on_disk(identity_files() | {"model.onnx": b"another"}), "digest", "export the bundle again"),
    Case("truncated", on_disk(_cut()), "parse", "export or copy it again"),
    Case("deep_recursion", on_disk(around(hostile.nested_subgraphs(2000))), "parse", "export"),
    Case("old_opset", _changed(hostile.old_opset), "opset", "opset_version=17"),
    Case("new_ir", _changed(hostile.new_ir), "ir_version", "export it again"),
    Case("wrong_input", on_disk(identity_files(observation={"shape": [3]})), "interface", "correct"),
    Case(
        "wrong_output", on_disk(identity_files(action={"kind": "discrete", "n": 3}, fallback=0)), "interface", "correct"
    ),
    Case("fixed_batch", on_disk(around(linear([[1, 0], [0, 1]], batch=3))), "batch", "dynamic batch axis"),
    Case("golden_shape", on_disk(identity_files() | _golden([[1.0]], [[1.0, 2.0]])), "golden", "again, together"),
    Case("golden_mismatch", on_disk(identity_files() | _golden(STATES, ZEROS)), "golden", "export both again"),
    Case("nan", on_disk(bundle_files(logarithm(), [[-1.0, 1.0]], [[0.0, 0.0]])), "finite", "look for log(0)"),
    Case("too_slow", on_disk(around(hostile.slow(), ZEROS, latency_budget_ms=0.001)), "latency", "smaller network"),
    *(Case(f"load_{change.__name__}", _changed(change), "load", "export it again") for change in (
        hostile.declared_huge, hostile.overflowing_dims, hostile.negative_dims)),
    *(Case(f"bomb_{make.__name__}", on_disk(around(make())), "memory", "ConstantOfShape") for make in (
        hostile.constant_of_shape, hostile.expand, hostile.tile, hostile.chain_of_constants)),
    Case("many_nodes", on_disk(around(hostile.of_empty_nodes(50_000))), "size", "smaller network"),
    Case("bomb_of_nodes", on_disk(around(hostile.of_empty_nodes(6_000_000))), "memory", "export it again"),
    Case("loop_without_end", on_disk(around(hostile.loop(None))), "cpu_time", "loop without an end"),
    Case("loop_of_quintillions", on_disk(around(hostile.loop(1 << 62))), "cpu_time", "loop without an end"),
    Case("loop_of_hours", on_disk(around(hostile.loop(1_000_000_000))), "cpu_time", "loop without an end"),
    Case("out_of_wall_time", on_disk(around(hostile.loop(None))), "wall_time", "try again later", HURRIED),
]  # fmt: skip
