"""Tasks by name, one file each."""
