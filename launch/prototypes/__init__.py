"""What was tried and is kept for measuring; nothing in the wheel imports it."""
