"""The cost of a model, computed from shapes: parameters, FLOPs, activation memory."""
