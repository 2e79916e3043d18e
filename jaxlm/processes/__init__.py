"""One process among others: how they meet, stop, are watched, and keep memory."""
