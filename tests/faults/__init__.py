"""Stores that fail on demand: a proxy before an S3 server, and a file system; both by a plan that a test can read.

with FaultyEndpoint(s3_endpoint) as endpoint:
    endpoint.plan.add(status(503), method="PUT", path="*/shards/*", first=2)  # twice for each shard
    endpoint.plan.add(RESET, share=0.05, seed=1)                              # the same 5 % in every run

with faulty_file_system(folder) as plan:
    plan.add(fails(TimeoutError), method="cat_file", path="bucket/photos/*", nth=[1])
    Fetcher().fetch("gs://bucket/photos/a.jpg")
"""

from tests.faults.endpoint import (
    LOST_REPLY,
    RESET,
    STALL,
    TRUNCATED,
    UNCONDITIONAL,
    FaultyEndpoint,
    HttpFault,
    Request,
    slow,
    status,
    together,
)
from tests.faults.file_system import HANGS, IGNORES_CONDITION, FileFault, fails, faulty_file_system
from tests.faults.plan import Plan

__all__ = [
    "HANGS",
    "IGNORES_CONDITION",
    "LOST_REPLY",
    "RESET",
    "STALL",
    "TRUNCATED",
    "UNCONDITIONAL",
    "FaultyEndpoint",
    "FileFault",
    "HttpFault",
    "Plan",
    "Request",
    "fails",
    "faulty_file_system",
    "slow",
    "status",
    "together",
]
