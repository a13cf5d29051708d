"""The run: requests become batches, interleaved lanes compute them, finished requests become records."""
