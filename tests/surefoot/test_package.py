"""The package agrees with the service and with its own documentation."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import policies.errors
import surefoot
from service import wire
from service.redis_streams import SCRIPT
from surefoot import _protocol as protocol
from surefoot.corrections import CorrectionOptions
from surefoot.errors import ApiError, api_error
from surefoot.streams import ReaderOptions, transitions
from tests.surefoot.stream_entries import correction_fields, fields, n_step_fields

DOCS = (Path(surefoot.__file__).parent.parent / "docs" / "client.md").read_text()


def subclasses(kind: Any) -> list[Any]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in subclasses(child))]


def test_all_is_what_the_package_shows() -> None:
    shown = {
        name
        for name in dir(surefoot)
        if not name.startswith("_") and (inspect.isclass(value := getattr(surefoot, name)) or inspect.isfunction(value))
    }
    assert sorted(surefoot.__all__) == sorted(shown)
    assert surefoot.__all__ == sorted(surefoot.__all__)
    for_a_checker = re.search(r"^if typing.TYPE_CHECKING:\n((?:    .*\n)+)", inspect.getsource(surefoot), re.MULTILINE)
    assert for_a_checker
    assert set(re.findall(r"\b\w+\b(?=[,\n])", re.sub(r"from .* import ", "", for_a_checker[1]))) == shown


SHOWN = """
import sys
import surefoot.redis_url
assert not {"httpx", "numpy", "redis", "msgspec"} & set(sys.modules), "one module loads the package"
from surefoot.estimate import evaluate
import surefoot.corrections
import surefoot
from surefoot import Client, corrections
assert callable(surefoot.estimate) and surefoot.corrections is corrections and surefoot.evaluate is evaluate
try:
    surefoot.actt
except AttributeError as error:
    assert "actt" in str(error)
else:
    raise AssertionError("a name that there is not")
"""


def test_the_package_loads_at_its_first_use_and_modules_hide_no_function() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_error_is_exported_and_documented() -> None:
    for kind in subclasses(surefoot.SurefootError):
        assert kind.__name__ in surefoot.__all__
        assert f"`{kind.__name__}`" in DOCS


def test_every_code_is_one_of_the_services_and_keeps_its_class() -> None:
    service_codes = {kind.code: kind for kind in subclasses(policies.errors.SurefootError)}
    for kind in subclasses(ApiError):
        for code in kind.codes:
            assert code in service_codes
            assert type(api_error(code, service_codes[code].status, "")) is kind
    unavailable = {each.code for each in subclasses(policies.errors.Unavailable)}
    assert unavailable == set(surefoot.Unavailable.codes)


def test_an_unknown_code_is_an_api_error_with_that_code() -> None:
    error = api_error("from_the_future", 418, "why")
    assert (type(error), error.code, error.status) == (ApiError, "from_the_future", 418)


def test_the_requests_have_the_services_fields() -> None:
    for build, request, own in (
        (protocol.act, wire.ActRequest, {"idempotency_key", "wire"}),
        (protocol.act_batch, wire.ActBatchRequest, {"wire"}),
        (protocol._reward_body, wire.RewardRequest, {"path", "value"}),
    ):
        parameters = set(inspect.signature(build).parameters) - own
        assert parameters | {"reward"} == set(request.__struct_fields__) | {"reward"}


def test_the_options_are_those_of_the_builders_and_documented() -> None:
    for build, options in (
        (protocol.act, set(protocol.ActOptions.__annotations__)),
        (protocol.act_batch, set(protocol.ActBatchOptions.__annotations__)),
        (protocol._reward_body, {*protocol.RewardItem.__annotations__, *protocol.EpisodeOptions.__annotations__}),
    ):
        keywords = {
            name
            for name, parameter in inspect.signature(build).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        assert keywords | {"reward"} == options | {"reward"}
        for name in keywords:
            assert re.search(rf"\b{name}\b", DOCS)


def test_the_answers_have_the_services_fields() -> None:
    from surefoot import answers

    for ours, theirs in (
        (answers.Decision, wire.ActResponse),
        (answers.Exploration, wire.Exploration),
        (answers.Safety, wire.Safety),
        (answers.PointDistribution, wire.PointDistribution),
        (answers.RewardReceipt, wire.RewardResponse),
        (answers._Columns, wire.ActBatchResponse),
    ):
        assert set(ours.__struct_fields__) == set(theirs.__struct_fields__)


def written(stream: str) -> list[str]:
    """The fields of an entry, as the join's script names them."""
    join = SCRIPT.decode()
    start = join.index(f"B .. ':{stream}', '*'")
    call = join[start : join.index(")\n", start)]
    return sorted(re.findall(r"'([a-z]{1,3})', ", call))


def test_the_join_writes_the_fields_that_are_read() -> None:
    assert written("transitions") == sorted(fields(0))
    assert written("nstep") == sorted(n_step_fields(0))
    assert written("correction") == sorted(correction_fields(0))


def test_the_options_of_a_reader_are_documented() -> None:
    for name in ReaderOptions.__annotations__:
        assert f"`{name}`" in DOCS
        assert re.search(rf"^    {name}: |[.)] {name}: ", transitions.__doc__ or "", re.MULTILINE), name
    assert set(CorrectionOptions.__annotations__) < set(ReaderOptions.__annotations__)
