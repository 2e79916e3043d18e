"""How fast, against whom, on what. See README.md."""
