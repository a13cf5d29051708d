"""Transports: ways to send rows between the ranks of a group, each with the methods of `base.Transport`."""
