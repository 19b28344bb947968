"""From windows to updates: the training loop, its loss, schedules, optimizers, precision and state."""
