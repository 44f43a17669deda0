"""The rows of the fault table that run against a whole service."""

from tests.faults.report import Row
from tests.faults.scenarios import (
    clocks,
    disconnects,
    disk,
    failover,
    forgetful,
    killed,
    overload,
    redis_away,
    redis_refuses,
    rewards,
    rolling,
    spool_steps,
    torn,
)

ROWS: tuple[Row, ...] = (
    *killed.ROWS,
    *spool_steps.ROWS,
    *rolling.ROWS,
    *redis_away.ROWS,
    *redis_refuses.ROWS,
    *failover.ROWS,
    *forgetful.ROWS,
    *disk.ROWS,
    *torn.ROWS,
    *clocks.ROWS,
    *disconnects.ROWS,
    *overload.ROWS,
    *rewards.ROWS,
)
