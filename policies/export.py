"""EDGE: trained policies to bundles: one function for every kind of file, one for each library.

Duty: find out what a file is and hand it to the exporter that reads it; write the files, after every check of a load.
Training libraries are imported only where a file of theirs is read.
Promise: what `export_file` writes passes every check of a load, or a BundleError says which not and nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from policies.bundle import MAX_MODEL_BYTES, read_bundle
from policies.engine import Engine
from policies.errors import BundleError
from policies.export_bundle import Files, Known, Options, assemble
from policies.export_d3rlpy import export_d3rlpy
from policies.export_qtable import export_qtable
from policies.export_sb3 import export_sb3
from policies.export_torch import export_torch, export_torch_file
from policies.graph import parse_model

KINDS = {
    ".onnx": "onnx",
    ".npy": "qtable",
    ".zip": "sb3",
    ".pt": "torch",
    ".pth": "torch",
    ".pt2": "torch",
    ".ts": "torch",
    ".d3": "d3rlpy",
}


def bundle_files(source: Path, options: Options, kind: str = "auto") -> Files:
    """Make a file of any kind the three files of a bundle, by name. Raises BundleError.

    kind: onnx (as SB3's documentation, d3rlpy, RLlib, rsl_rl, Godot RL, ML-Agents or plain torch write it), qtable (an
    array [states, actions]), sb3 (what `model.save` wrote), torch (TorchScript, or a `torch.export` program .pt2),
    d3rlpy (what `algo.save` wrote); auto tells by the file's ending.
    """
    found = KINDS.get(source.suffix.lower()) if kind == "auto" else kind
    if not source.is_file():
        raise BundleError(f"there is no file {source}", "source", "files")
    if found == "onnx":
        return assemble(read_onnx(source), options)
    if found == "qtable":
        return export_qtable(_table(source), options)
    if found == "sb3":
        return export_sb3(source, options)
    if found == "torch":
        return export_torch_file(source, options)
    if found == "d3rlpy":
        return export_d3rlpy(source, options)
    known = ", ".join(sorted(set(KINDS.values())))
    detail = f"{source.name}: its ending does not say what it is ({', '.join(KINDS)}); add --kind, one of {known}"
    raise BundleError(detail, "kind", "profile")


def export_file(source: Path, options: Options, out: Path, kind: str = "auto") -> Path:
    """Write the bundle of a file to OUT/POLICY/VERSION and return that folder. Raises BundleError."""
    return write_files(bundle_files(source, options, kind), out)


def write_files(files: Mapping[str, bytes], out: Path) -> Path:
    """Write a bundle to OUT/POLICY/VERSION after every check of a load. Raises BundleError, and writes nothing then."""
    bundle = read_bundle(files)
    Engine(bundle)
    folder = (out / bundle.policy / bundle.version).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read_onnx(source: Path) -> onnx.ModelProto:
    """Read an ONNX file of the owner's, with the weights that torch's newer exporter writes beside it.

    Only a regular file in the same folder is read, and the weights become part of the network: what is served holds
    everything in one file. Raises BundleError.
    """
    raw = source.read_bytes()
    if len(raw) > MAX_MODEL_BYTES:
        raise BundleError(f"{source.name} has {len(raw)} bytes, the cap is {MAX_MODEL_BYTES}", "model.onnx", "size")
    proto = parse_model(raw)
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        tensor.raw_data = _beside(source, told)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return proto


def _beside(source: Path, told: Mapping[str, str]) -> bytes:
    """Read one tensor's bytes from the file beside. Raises BundleError for any other place."""
    location = told.get("location", "")
    file = source.parent / location
    plain = bool(location) and Path(location).name == location and not file.is_symlink()
    offset, length = told.get("offset", "0"), told.get("length", "")
    if not plain or not file.is_file() or not offset.isdigit() or not length.isdigit():
        detail = (
            f"{source.name} keeps weights in {location!r}; that must be a file beside it: copy both, or export again"
        )
        raise BundleError(f"{detail} with external_data=False", "model.onnx", "external_data")
    if file.stat().st_size > MAX_MODEL_BYTES:
        raise BundleError(f"{location} is larger than the cap of {MAX_MODEL_BYTES} bytes", "model.onnx", "size")
    with file.open("rb") as opened:
        opened.seek(int(offset))
        return opened.read(int(length))


def _table(source: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(source, allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise BundleError(f"{source.name} is no array of numpy's save: {error}", "source", "profile") from None


__all__ = [
    "KINDS",
    "Files",
    "Known",
    "Options",
    "assemble",
    "bundle_files",
    "export_d3rlpy",
    "export_file",
    "export_qtable",
    "export_sb3",
    "export_torch",
    "export_torch_file",
    "read_onnx",
    "write_files",
]
