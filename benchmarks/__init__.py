"""What a step costs: measured, not asserted."""
