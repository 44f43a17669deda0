"""Shadow: learning about versions that do not decide yet. Only `service` imports it."""
