"""Preferences: pairs of answers to one prompt, read from tables, laid into rows side by side."""
