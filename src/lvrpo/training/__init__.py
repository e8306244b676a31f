"""Training: the RL trainer and its losses, supervised pretraining, rollout, checkpoints, run directories."""
