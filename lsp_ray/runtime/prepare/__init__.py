"""What is decided about a run before any actor starts."""
