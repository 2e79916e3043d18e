"""One file a training stage: an objective, its data, its extra models."""
