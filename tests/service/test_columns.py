"""Texts and numbers in a terminal's columns: nothing wider than said, no control character, whatever comes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.columns import cells, clean, count, field, fit, left, number, percent, right, row, span, wrap

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2028\u2029\ud800-\udfff]")
ANY = st.text(st.characters(exclude_categories=()), max_size=40)


@settings(deadline=None)
@given(ANY, st.integers(0, 30))
def test_a_fitted_text_has_no_control_character_and_is_no_wider(text: str, width: int) -> None:
    assert cells(fit(text, width)) <= width
    assert not CONTROL.search(fit(text, width))
    assert cells(left(text, width)) == cells(right(text, width)) == width
    if cells(clean(text)) <= width:
        assert fit(text, width) == clean(text)


@settings(deadline=None)
@given(ANY, st.integers(2, 30))
def test_wrapped_lines_fit_and_hold_every_word(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert all(cells(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(clean(text).split())


@settings(deadline=None)
@given(st.floats() | st.integers() | st.integers(-(10**600), 10**600) | st.none())
def test_any_number_fits_seven_characters(value: float | None) -> None:
    text = number(value)
    assert 1 <= len(text) <= 7
    if isinstance(value, float) and 1e-300 < abs(value) < 1e300:
        assert float(text) == pytest.approx(value, rel=0.34)


@settings(deadline=None)
@given(st.floats() | st.integers(-(10**30), 10**30))
def test_any_span_is_written(seconds: float) -> None:
    assert re.fullmatch(r"ever|[\d,.]+ (d|h|min|s)( \d+ (h|min|s))?", span(seconds))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59.9, "59 s"), (60, "1 min"), (135, "2 min 15 s"), (3600, "1 h"), (12_000, "3 h 20 min"),
     (86_400 * 7, "7 d"), (86_400 * 1500 + 7300, "1,500 d 2 h"), (1e15, "ever"), (float("nan"), "ever")],
)  # fmt: skip
def test_spans_are_written_in_two_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1_234_567, "1234567"), (-12_345_678, "-1.2e+7"), (12_345.678, "12346"), (-123_456.7, "-123457"),
     (999, "999"), (0.05, "0.05"), (-0.123456, "-0.1235"),
     (-1.23456e-7, "-1e-07"), (1.23456e-7, "1.2e-07"), (float("inf"), "-"), (float("nan"), "-"), (None, "-"),
     (-1.7e308, "-2e+308")],
)  # fmt: skip
def test_numbers_keep_what_fits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_counts_shares_and_rows() -> None:
    assert [count(1), count(1, "unit"), count(1232, "unit")] == ["1", "1 unit", "1,232 units"]
    assert count(10**5000) == "1.00e+5000"
    assert [percent(0.05), percent(0.0512345), percent(None), percent(float("inf"))] == ["5 %", "5.12 %", "-", "-"]
    assert row(("name", "1", "22"), (6, 3, 4)) == "name     1   22"


def test_wide_letters_take_two_cells_and_combining_ones_none() -> None:
    assert [cells("漢字"), cells("e\u0301"), fit("漢字漢字", 7), fit("abc", 1)] == [4, 1, "漢字..", "."]


def test_what_moves_a_cursor_becomes_a_question_mark() -> None:
    assert clean("\x1b[2Jgone\nnext\t\u202eleft") == "?[2Jgone next ?left"


def test_a_field_hangs_behind_its_label() -> None:
    lines = field("waits for", "one two three", 20, "bad")
    assert [line.text for line in lines] == ["waits for  one two", "           three"]
    assert {line.tone for line in lines} == {"bad"}
