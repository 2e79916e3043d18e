"""Conversations: read from tables, packed into rows."""
