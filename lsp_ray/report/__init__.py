"""What a person sees of a run: live progress, and report.html from what the run left."""
