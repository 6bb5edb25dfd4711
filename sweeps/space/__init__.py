"""What a study searches, and by which sampler and pruner."""
