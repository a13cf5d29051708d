"""The run: requests become batches, lanes interleave, finished requests become records."""
