"""Training: the loop, its step, its schedules, and how far it has come."""
