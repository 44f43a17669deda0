"""Load tests: locust and wrk drivers. They speak HTTP only."""
