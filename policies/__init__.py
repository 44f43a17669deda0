"""Policies: what a policy is, and how an observation becomes a distribution over actions."""
