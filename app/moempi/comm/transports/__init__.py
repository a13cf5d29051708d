"""Transports: ways for rows to travel between the ranks of a group, behind one `start` and one `finish`."""
