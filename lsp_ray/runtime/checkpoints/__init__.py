"""A run's state on the disk, and what it takes to go on from there."""
