"""How orders and payloads cross from process to process."""
