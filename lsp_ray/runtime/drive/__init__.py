"""The loop between a policy that decides and workers that act, and its books."""
