"""Configs of other toolkits -> ours: a table for each of them, and what became of every key."""
