"""A whole run: data, model, loop and records; stopping and resuming it."""
