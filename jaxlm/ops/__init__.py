"""Pure functions of arrays. No parameters, no mesh, no Flax. `torch_ref.ops` has the same names in PyTorch."""
