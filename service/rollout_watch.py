"""EDGE: a rollout's live view: asks the service again and again, and draws what it says on a terminal or into a pipe.

Duty: when to ask, what to do while the service is away, how to draw. What is drawn stands in `rollout_text.py`.
Strategy: on a terminal each frame is drawn over the one before (home, each line cleared to its end, the rest cleared):
nothing flickers and nothing scrolls. Anywhere else frames follow one another as plain text.
Promise: the service may go away and come back; the last view stays, and says since when nothing newer came. The cursor
comes back, however the view ends. Only what no waiting mends ends it: a token that is refused, a policy that is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from service.columns import Line, Tone, field, fit, span
from service.push import Refusal
from service.rollout_calls import Seen
from service.rollout_text import frame

HOME, CLEAR, TO_LINE_END, TO_END = "\x1b[H", "\x1b[2J", "\x1b[K", "\x1b[J"
HIDE, SHOW, PLAIN = "\x1b[?25l", "\x1b[?25h", "\x1b[0m"
PAINT: Final[dict[Tone, str]] = {"head": "\x1b[1m", "good": "\x1b[32m", "bad": "\x1b[31;1m", "dim": "\x1b[2m"}
MENDABLE = 500  # statuses from here, 429, and silence pass by themselves


class Screen:
    """Where frames go. `live`: on a terminal that understands escape codes, each over the one before."""

    def __init__(self, out: TextIO | None = None, *, over: bool = True) -> None:
        """over: draw frames over one another, where that can be; else one follows the other."""
        self.out = sys.stdout if out is None else out
        terminal = self.out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.live = terminal and over
        self._colours = terminal and not os.environ.get("NO_COLOR")  # https://no-color.org
        self._drawn = 0

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def draw(self, lines: list[Line]) -> None:
        """Draw a frame in place of the one before, or below it."""
        texts = [self._paint(line) for line in (self._cut(lines) if self.live else lines)]
        if self.live:
            start = HOME if self._drawn else CLEAR + HOME
            text = start + "".join(f"{each}{TO_LINE_END}\n" for each in texts) + TO_END
        else:
            text = ("\n" if self._drawn else "") + "".join(f"{each}\n" for each in texts)
        self._drawn += 1
        encoding = self.out.encoding or "utf-8"
        self.out.write(text.encode(encoding, "replace").decode(encoding))
        self.out.flush()

    def _cut(self, lines: list[Line]) -> list[Line]:
        """As many lines as the terminal has, less the one in which the cursor rests."""
        room = max(2, shutil.get_terminal_size().lines - 1)
        if len(lines) <= room:
            return lines
        hidden = len(lines) - room + 1
        return [*lines[: room - 1], Line(fit(f".. {hidden} more lines: a higher window shows them", self.width), "dim")]

    def _paint(self, line: Line) -> str:
        paint = PAINT.get(line.tone, "") if self._colours else ""
        return f"{paint}{line.text}{PLAIN}" if paint and line.text else line.text

    @contextmanager
    def hidden_cursor(self) -> Iterator[None]:
        """Hide the cursor of a terminal meanwhile; it comes back also when a signal ends the command."""
        if not self.live:
            yield
            return
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.out.write(HIDE)
        try:
            yield
        finally:
            self.out.write(SHOW)
            self.out.flush()
            signal.signal(signal.SIGTERM, before)


class Watch:
    """A live view. `run_once` asks and draws; `run` goes on until Ctrl-C."""

    def __init__(self, ask: Callable[[], Seen], screen: Screen, monotonic_s: Callable[[], float] = time.monotonic):
        self._ask, self._screen, self._monotonic_s = ask, screen, monotonic_s
        self._last: Seen | None = None
        self._answered_s = 0.0

    def run_once(self) -> None:
        """Ask, and draw. Raises Refusal where nothing was ever seen, or waiting would not help."""
        try:
            seen = self._ask()
            lines = frame(seen.view, seen.at_ms, self._screen.width)
        except Refusal as refusal:
            if self._last is None or not passes_by_itself(refusal):
                raise
            lines = self._away(self._last, refusal)
        else:
            self._last, self._answered_s = seen, self._monotonic_s()
        self._screen.draw(lines)

    def run(self, wait: Callable[[], object]) -> None:
        """Draw frames until Ctrl-C. wait: until the next one. Raises Refusal as `run_once`."""
        try:
            with self._screen.hidden_cursor():
                while True:
                    self.run_once()
                    wait()
        except KeyboardInterrupt:
            return

    def _away(self, last: Seen, refusal: Refusal) -> list[Line]:
        """The last view below what is wrong and since when; spans in it are those of then."""
        width = self._screen.width
        since = f"nothing new for {span(self._monotonic_s() - self._answered_s)}: {refusal.detail}"
        told = field("AWAY", since, max(width, 40), "bad")
        return [*(Line(fit(line.text, width), line.tone) for line in told), *frame(last.view, last.at_ms, width)]


def passes_by_itself(refusal: Refusal) -> bool:
    """Whether asking again may help: silence, something in between that answers for the service, or too many calls."""
    status = refusal.problem.get("status")
    return not isinstance(status, int) or status >= MENDABLE or status == 429
