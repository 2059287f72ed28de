"""attacks/matching."""
