"""Attention: which keys a query sees, and the kernels that compute it."""
