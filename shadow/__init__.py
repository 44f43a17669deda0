"""Shadow: learning about versions that do not decide. Empty until rollouts are built; `service` may import it."""
