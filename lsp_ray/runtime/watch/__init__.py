"""What is written and shown of a run's steps: metrics, trackers, warnings."""
