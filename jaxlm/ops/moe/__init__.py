"""Mixture of experts: routing, dispatch, and the products of the experts."""
