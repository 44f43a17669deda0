"""Load tests: the benchmarks, their open-loop driver, wrk and locust. They speak HTTP only."""

import os

# ONNX Runtime's Linux builds report usage to their vendor unless told not to; nobody is measured while doing that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
