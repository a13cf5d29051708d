"""Processes: how ranks start, are watched, agree on errors, and end together."""
