"""One step on the device: forward, backward, compress; receive, decompress, add. Knows nothing of Ray."""
