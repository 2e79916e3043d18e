"""Pure losses of arrays. No model, no mesh. `torch_ref.objectives` has the same names in PyTorch."""
