"""The actor runtime on Ray: cluster, slots, actors, driver. Nothing else imports ray."""
