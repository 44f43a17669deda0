"""The service: edges and wiring around the pure packages. Start at act.py."""
