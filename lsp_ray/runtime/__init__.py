"""The actor runtime on Ray. Nothing else imports ray.

    prepare       what is decided about a run before any actor starts: the job
    cluster       Ray's processes
    transport     how orders and payloads cross from process to process
    actors        those who act: GPU actor and shards, on Ray or as threads
    drive         the loop between policy and workers, and its books
    checkpoints   a run's state on the disk
    watch         metrics, trackers, warnings

A run goes from `persistence` (again, where workers are lost) to `fine_tune` (from job to result) to `training` (steps).
"""
