"""`Seen` against a plain set, and its bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from surefoot.dedupe import Seen

WINDOW = 3000
SEQS = st.integers(0, 20_000)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 2), SEQS), max_size=200))
def test_it_never_calls_seen_what_was_not_and_knows_all_within_the_window(events: list[tuple[str, int, int]]) -> None:
    seen, plain = Seen(WINDOW), set[tuple[str, int, int]]()
    highest: dict[tuple[str, int], int] = {}
    for producer, epoch, seq in events:
        source = (producer, epoch)
        highest[source] = max(highest.get(source, 0), seq)
        new = seen.add(producer, epoch, seq)
        known = (producer, epoch, seq) in plain
        assert new or known
        if known and seq > highest[source] - WINDOW:
            assert not new
        plain.add((producer, epoch, seq))


@given(st.lists(SEQS, max_size=300))
def test_its_memory_is_bounded(seqs: list[int]) -> None:
    seen = Seen(WINDOW, sources=3)
    for epoch, seq in enumerate(seqs):
        seen.add("a", epoch % 5, seq)
        statistics = seen.statistics()
        assert statistics["sources"] <= 3
        assert statistics["pages"] <= 3 * (WINDOW // 1024 + 2)


def test_half_of_a_million_numbers_in_use_takes_what_the_window_takes() -> None:
    seen = Seen(1 << 16)
    assert all(seen.add("a", 1, seq) for seq in range(0, 1_000_000, 2))
    assert seen.statistics() == {"sources": 1, "pages": 65}
