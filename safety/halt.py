"""Kill switches: what an operator turns off at once, for every decision of a policy. Pure.

freeze_exploration   nothing is explored: ε is zero
baseline_only        the baseline version answers in place of every other
fallback_only        no network is asked: the declared fallback answers
"""

from __future__ import annotations

from typing import Literal

KillSwitch = Literal["freeze_exploration", "baseline_only", "fallback_only"]
