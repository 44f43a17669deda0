"""Shadow: learning about versions that do not decide, and what may be concluded. `service` may import it."""
