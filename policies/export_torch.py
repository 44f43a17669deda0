"""EDGE: PyTorch modules to bundles. Needs torch.

Duty: a module and an example of what it observes become an ONNX file with an open batch axis, everything in one file.
Strategy: the TorchScript exporter (`dynamo=False`), also for programs of `torch.export`: the newer exporter fails on
torch.distributions, which most policies hold, writes weights to a second file and needs a further package.
Promise: the file answers as the module does, for one state and for several, or a BundleError says how far off it is.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from policies.errors import BundleError
from policies.export_bundle import Files, Known, Options, States, assemble
from policies.heads import index_rows
from policies.manifest import GOLDEN, MANIFEST, action_spec, read_manifest
from policies.types import Choices

OPSET = 17
# float32 sums in another order: what torch and ONNX Runtime may differ by.
RTOL, ATOL = 1e-3, 1e-4

# What a network does: tensors [B, *shape] to one tensor [B, n], or to two, means and log deviations.
Answer = Callable[[Any], Any]


def export_torch(module: Any, example: Any, options: Options) -> Files:
    """Make an `nn.Module` a bundle.

    module: called with observations [B, *shape]; answers with what `options.head` says, [B, n], or with a pair (mean,
    log_std) for the gaussian heads. example: observations [B, *shape], an array or a tensor; a few states as in
    training make good golden vectors, zeros will do.

    Gives the three files by name. Raises BundleError: what the module does not say and an option would, or that the
    ONNX file answers otherwise than the module.
    """
    torch = library("torch")
    states = np.asarray(example.detach().cpu() if isinstance(example, torch.Tensor) else example)
    if states.dtype.kind != "f":
        states = states.astype(np.float32)
    parameter = next(module.parameters(), None)
    device = "cpu" if parameter is None else parameter.device
    single = states.dtype != np.float64 or (parameter is not None and parameter.dtype == torch.float32)
    states = states.astype(np.float32 if single else np.float64)
    training = module.training
    module.eval()
    try:
        proto = to_onnx(module, torch.from_numpy(states).to(device), options.head or "", [module])
        known = Known(training={"exported_from": f"torch {torch.__version__}"}, states=_golden_states(states))
        files = assemble(proto, options, known)
        verify(files, lambda rows: module(rows.to(device)))
    finally:
        module.train(training)
    return files


def export_torch_file(source: Path, options: Options) -> Files:
    """Make a TorchScript file, or a program of `torch.export` (`.pt2`), a bundle. Raises BundleError.

    A TorchScript file does not say what it observes: `options.shape` does.
    """
    torch = library("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what many files are
        if source.suffix == ".pt2":
            return _export_program(torch.export.load(source), options)
        if not _is_torchscript(source):
            detail = (
                f"{source.name} holds weights without a network; build the network in Python and call "
                "policies.export.export_torch, or save it with torch.export.save as .pt2"
            )
            raise BundleError(detail, "source", "profile")
        module = torch.jit.load(source, map_location="cpu")
    if not options.shape:
        raise BundleError(
            "a TorchScript file does not say what it observes; add --shape, e.g. --shape 4", "shape", "profile"
        )
    return export_torch(module, np.zeros((2, *options.shape), np.float32), options)


def to_onnx(
    answer: Answer, example: Any, head: str, modules: Sequence[Any], batch: int | None = None
) -> onnx.ModelProto:
    """Export what `answer` does with observations like `example` [B, *shape]. modules: those whose weights it uses.

    The outputs are named after the head, so that a profile reads them as that. batch: where only one size is possible.
    """
    torch = library("torch")

    class Holder(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.held = torch.nn.ModuleList(modules)

        def forward(self, states: Any) -> Any:
            return answer(states)

    file = io.BytesIO()
    example = torch.zeros_like(example[:1]).expand(batch or 2, *example.shape[1:]).contiguous()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecation, and tracer warnings, which `verify` answers
        given = answer(example)
        outputs = _names(head, len(given) if isinstance(given, tuple | list) else 1)
        names = ["observation", *outputs]
        axes = {} if batch else {name: {0: "batch"} for name in names}
        try:
            torch.onnx.export(
                answer if isinstance(answer, torch.jit.ScriptModule) else Holder().eval(),
                (example,),
                file,
                opset_version=OPSET,
                dynamo=False,
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes=axes,
            )
        except Exception as error:  # torch raises many types of its own
            detail = f"torch cannot export this network: {error}"
            raise BundleError(detail, "source", "profile") from error
    return onnx.load_model_from_string(file.getvalue())


def verify(files: Files, answer: Answer) -> None:
    """Hold the golden vectors, which ONNX Runtime gave, against the source's own answers, asked state by state.

    Raises BundleError naming the first state on which they differ.
    """
    torch = library("torch")
    golden = json.loads(files[GOLDEN])
    manifest = read_manifest(files[MANIFEST])
    states = torch.from_numpy(np.array(golden["states"], dtype=manifest.observation.dtype))
    action = action_spec(manifest)
    with torch.no_grad():
        own = np.concatenate([_row(answer(states[row : row + 1])) for row in range(len(states))])
    if manifest.head == "action" and isinstance(action, Choices):
        own = index_rows(own, action.nvec)
    close = np.isclose(own.reshape(len(states), -1), np.array(golden["outputs"]), rtol=RTOL, atol=ATOL).all(axis=1)
    if not close.all():
        at = int(np.flatnonzero(~close)[0])
        detail = f"the ONNX file answers {golden['outputs'][at]}, the network itself {own[at].tolist()}"
        raise BundleError(f"{detail}, for state {at} of golden.json", "golden.json", "profile")


def library(name: str) -> Any:
    """Import a training library. Raises BundleError where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        detail = f"{name} is not installed; install what the policy was trained with, or pip install 'surefoot[export]'"
        raise BundleError(detail, "source", "profile") from None


def _export_program(program: Any, options: Options) -> Files:
    """Export a program of `torch.export`, which says itself what it observes and for how many states at once."""
    torch = library("torch")
    inner = program.module()
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    examples: Sequence[Any] = program.example_inputs[0] if program.example_inputs else ()
    if len(examples) != 1:
        raise BundleError("a program must read exactly one observation", "model.input", "profile")
    proto = None
    for batch in (None, 1):  # a program exported without dynamic_shapes takes one size only
        try:
            proto = to_onnx(inner, examples[0], options.head or "", [], batch)
            break
        except (AssertionError, RuntimeError, BundleError):
            continue
    if proto is None:
        detail = "the program takes batches of one size only; export it with dynamic_shapes, the first axis dynamic"
        raise BundleError(detail, "model.input", "profile")
    files = assemble(proto, options, Known(training={"exported_from": f"torch {torch.__version__}"}))
    verify(files, inner)
    return files


def _names(head: str, count: int) -> list[str]:
    """Name outputs so that a profile reads them as the head that they are; `output` where the owner has not said."""
    if count == 1:
        return [head or "output"]
    if count == 2:
        return ["mean", "log_std"]
    detail = "the network answers with more than means and log deviations; export it with torch.onnx.export yourself"
    raise BundleError(detail, "model.output", "profile")


def _row(answer: Any) -> npt.NDArray[Any]:
    parts = answer if isinstance(answer, tuple | list) else [answer]
    return np.concatenate([np.asarray(part.detach().cpu()).reshape(len(part), -1) for part in parts], axis=1)


def _golden_states(states: States) -> States | None:
    return states if len(np.unique(states, axis=0)) > 1 else None


def _is_torchscript(source: Path) -> bool:
    if not zipfile.is_zipfile(source):
        return False
    with zipfile.ZipFile(source) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
