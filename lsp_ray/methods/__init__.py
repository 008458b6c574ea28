"""What each method trains, sends and applies."""
