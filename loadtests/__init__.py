"""Load tests: the benchmark with its open-loop driver, wrk and locust. They speak HTTP only."""
