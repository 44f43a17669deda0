"""Safety: what may be executed. Total functions that never raise on data."""
