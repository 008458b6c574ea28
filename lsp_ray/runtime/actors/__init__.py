"""Those who act: the GPU actor and the shards, on Ray or as threads of one process."""
