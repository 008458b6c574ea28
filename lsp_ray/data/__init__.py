"""Data's way in: a data set by name, as rows, as token ids, as micro-batches."""
