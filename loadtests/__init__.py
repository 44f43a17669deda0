"""Measuring: what the service costs, as its users meet it. It speaks HTTP, and imports nothing of the service."""

import os

# ONNX Runtime's Linux builds report usage to their vendor unless told not to; nobody is to be measured while doing that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
