"""Token buckets: how often somebody may do something. Pure: the time is an argument.

Strategy: one number and one time for each name; the least recently seen names go when there are too many, and a name
that comes back begins with a full bucket. Addresses of IPv6 count by /64, since a caller has as many of the rest as it
wants.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from typing import Final

MAX_NAMES: Final = 10_000  # some 2 MB


class Throttle:
    """Buckets of one size, by name. rate: how many come back per second. burst: how many one holds."""

    def __init__(self, rate: float, burst: float, max_names: int = MAX_NAMES) -> None:
        self._rate = rate
        self._burst = burst
        self._max_names = max_names
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what was left, when

    def left(self, name: str, now_s: float) -> float:
        """Say how many are left in a bucket."""
        left, at_s = self._buckets.get(name, (self._burst, now_s))
        return min(self._burst, left + (now_s - at_s) * self._rate)

    def take(self, name: str, now_s: float) -> int:
        """Take one. Gives 0 when there was one, else in how many whole seconds there is one again."""
        left = self.left(name, now_s)
        taken = left >= 1.0
        self._buckets[name] = (left - 1.0 if taken else left, now_s)
        self._buckets.move_to_end(name)
        if len(self._buckets) > self._max_names:
            self._buckets.popitem(last=False)
        return 0 if taken else self.wait_s(name, now_s)

    def wait_s(self, name: str, now_s: float) -> int:
        """In how many whole seconds, at least 1, a bucket holds one."""
        return max(1, math.ceil((1.0 - self.left(name, now_s)) / self._rate))


def bucket_of(address: str) -> str:
    """Name the bucket of an address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(IPv6Address(int(parsed) >> 64 << 64)) + "/64"
    return address
