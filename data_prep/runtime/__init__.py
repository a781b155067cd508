"""Ray, for both packages: how to reach a cluster or start one here, and what went wrong with it, in words."""
