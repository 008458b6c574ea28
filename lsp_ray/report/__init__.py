"""What a person sees of a run: progress while it lasts."""
