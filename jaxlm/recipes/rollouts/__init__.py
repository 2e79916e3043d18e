"""Phases of reinforcement learning: samples of the policy, their rewards, and the batches that follow."""
