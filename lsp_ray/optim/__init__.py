"""The optimizer on flat float32 buffers: AdamW and the shard that owns its state."""
