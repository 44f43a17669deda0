"""The live view as processes of their own run it: on a terminal, in a pipe, while the service goes and comes back."""

from __future__ import annotations

import copy
import io
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.columns import Line
from service.push import Refusal
from service.rollout_calls import Seen
from service.rollout_watch import CLEAR, HIDE, HOME, SHOW, TO_END, Screen, Watch, passes_by_itself
from tests.service.rollout_server import RolloutServer, answering
from tests.service.rollout_views import CANARY, NOW_MS
from tests.service.terminals import Shown, terminal, watching

HEAD = "generation 12"


@pytest.fixture
def server() -> Iterator[RolloutServer]:
    with answering(copy.deepcopy(CANARY)) as mine:
        yield mine


def frames(count: int) -> Callable[[str], bool]:
    return lambda text: text.count(HEAD) >= count


def test_on_a_terminal_frames_are_drawn_over_one_another(server: RolloutServer) -> None:
    with terminal(server.url, watching()) as shown:
        shown.until(frames(3), "three frames")
        assert shown.end(signal.SIGINT) == 0
        assert shown.errors == ""
    assert shown.text.startswith(HIDE + CLEAR + HOME)
    assert shown.text.rstrip().endswith(SHOW)
    assert shown.text.count(CLEAR) == 1
    assert shown.text.count(HOME) >= 3
    assert shown.text.count(TO_END) >= 3
    assert "\x1b[31;1mlatency " in shown.text, "what is worse stands out"


def test_each_frame_shows_what_is_new(server: RolloutServer) -> None:
    with terminal(server.url, watching()) as shown:
        shown.until(frames(1), "a frame")
        server.view["standing"] |= {"stage": "quarantined", "reason": "latency is worse"}
        shown.until(lambda text: "champion [quarantined]" in text and "latency is worse" in text, "the rollback")


def test_the_service_may_go_and_come_back(server: RolloutServer) -> None:
    with terminal(server.url, watching()) as shown:
        shown.until(frames(1), "a frame")
        port = server.server_port
        server.shutdown()
        server.server_close()
        away = shown.until(lambda text: "nothing new for 1 s: " in text and TO_END in text, "that it is away")
        assert "is the" in away
        assert HEAD in away, "the last view stays"
        with answering(copy.deepcopy(CANARY | {"generation": 99}), port):
            shown.until(lambda text: "generation 99" in text, "the service")
            again = shown.until(frames_of("generation 99", 2), "two frames more")
            assert "AWAY" not in again.split(HOME, 1)[1]
        assert shown.end(signal.SIGINT) == 0


def frames_of(head: str, count: int) -> Callable[[str], bool]:
    return lambda text: text.count(head) >= count and text.endswith(TO_END)


def test_a_gateway_that_answers_for_the_service_counts_as_away(server: RolloutServer) -> None:
    with terminal(server.url, watching()) as shown:
        shown.until(frames(1), "a frame")
        server.broken = "<html>bad gateway</html>"
        shown.until(lambda text: "answered 502" in text, "that it is away")
        server.broken = None
        shown.until(lambda text: text.count(HOME) > 2 and "AWAY" not in text[text.rindex(HOME) :], "the service")


def test_what_waiting_does_not_mend_ends_the_view_with_one_line(server: RolloutServer) -> None:
    with terminal(server.url, watching()) as shown:
        shown.until(frames(1), "a frame")
        server.view["policy"] = "another"
        assert shown.ended() == 1
        assert shown.errors.startswith("surefoot: refused (unknown_policy)")
        assert shown.text.rstrip().endswith(SHOW)


def test_a_signal_that_ends_it_gives_the_cursor_back(server: RolloutServer) -> None:
    with terminal(server.url, watching()) as shown:
        shown.until(frames(1), "a frame")
        assert shown.end(signal.SIGTERM) == 0
    assert shown.text.rstrip().endswith(SHOW)


def test_a_low_window_says_how_much_it_hides(server: RolloutServer) -> None:
    with terminal(server.url, watching(), lines=12, NO_COLOR="1") as shown:
        frame, _, _ = shown.until(lambda text: TO_END in text, "a frame").partition(
            TO_END
        )  # more than one may be there
        assert frame.count("\n") == 11
        assert ".. 16 more lines: a higher window shows them" in frame
        assert "\x1b[31" not in frame


@pytest.mark.parametrize("dumb", [True, False])
def test_elsewhere_frames_follow_one_another_as_plain_text(server: RolloutServer, dumb: bool) -> None:
    if dumb:
        with terminal(server.url, watching(), TERM="dumb") as shown:
            shown.until(frames(3), "three frames")
            assert shown.end(signal.SIGINT) == 0
    else:
        mine, its = os.pipe()
        shown = Shown(server.url, watching(), mine, its)
        shown.until(frames(3), "three frames")
        assert shown.end(signal.SIGINT) == 0
        shown.close()
    assert "\x1b" not in shown.text
    first, second = shown.text.replace("\r", "").split("\n\ncartpole ")[:2]
    assert first == f"cartpole {second}"


# -- One frame after the other ----------------------------------------------------------------------------------------


def test_it_says_since_when_nothing_new_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    now_s, out, answers = [0.0], io.StringIO(), iter([Seen(CANARY, '"12"', NOW_MS)])

    def ask() -> Seen:
        for seen in answers:
            return seen
        raise Refusal("http://nowhere does not answer")

    view = Watch(ask, Screen(out), lambda: now_s[0])
    view.run_once()
    now_s[0] = 125.0
    view.run_once()
    again = out.getvalue().split("\n\nAWAY", 1)[1]
    assert again.startswith("       nothing new for 2 min 5 s: http://nowhere does not answer\ncartpole  ")


def test_nothing_was_ever_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> Seen:
        raise Refusal("http://nowhere does not answer")

    with pytest.raises(Refusal, match="does not answer"):
        Watch(ask, Screen(io.StringIO())).run(lambda: None)


@pytest.mark.parametrize(
    ("problem", "passes"),
    [({}, True), ({"status": 503}, True), ({"status": 429}, True), ({"status": 401}, False), ({"status": 404}, False)],
)
def test_what_passes_by_itself(problem: dict[str, Any], passes: bool) -> None:
    assert passes_by_itself(Refusal("no", problem)) is passes


def test_letters_that_a_terminal_does_not_know_are_replaced() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, "ascii", write_through=True)
    Screen(out).draw([Line("für α")])
    assert raw.getvalue() == b"f?r ?\n"
