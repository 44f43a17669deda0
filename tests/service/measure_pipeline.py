"""Print what a decision costs in process, and what rules add: `python -m tests.service.measure_pipeline`.

Medians in µs of whole batches through a pipeline around a small real network, its ledger in memory; the ratio is within
one run. Run the file in a checkout of another commit to compare the two.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from prometheus_client import CollectorRegistry

from safety.document import read_rules
from service.metrics import Metrics
from service.plan import Row, Safeguards
from service.ruling import Ruling
from tests.policies.networks import linear
from tests.service.pipelines import decider, plan, version

RULES = b"""schema: 1
policy: toy
rules:
- {name: one, kind: forbid, when: 'state.f0 > 5.0 && action.index == 1'}
- {name: two, kind: confidence, min_gap: 0.000001}
"""


async def cost_us(rows: int, batches: int, safeguards: Safeguards | None) -> float:
    """The median of so many batches."""
    in_force = plan({"v1": version(Metrics(CollectorRegistry()), "v1", linear([[1, 0], [0, 1]]))})
    with decider(in_force) as (pipeline, _, _):
        if safeguards is not None:
            pipeline.safeguards = safeguards
        taken = []
        for _ in range(batches):
            began_s = time.perf_counter()
            await pipeline.decide([Row(state=[0.0, 1.0]) for _ in range(rows)])
            taken.append(time.perf_counter() - began_s)
    return statistics.median(taken) * 1e6


async def main() -> None:
    bundle = version(Metrics(CollectorRegistry()), "v1", linear([[1, 0], [0, 1]])).bundle
    ruled = Safeguards(ruling=Ruling.fitting(read_rules(RULES), bundle))
    print("rows  no rules (µs)  two rules (µs)  ratio")  # noqa: T201
    for rows, batches in ((1, 600), (16, 300), (128, 60)):
        plain, held = [await cost_us(rows, batches, safeguards) for safeguards in (None, ruled)]
        print(f"{rows:4}  {plain:13.0f}  {held:14.0f}  {held / plain:5.2f}")  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
