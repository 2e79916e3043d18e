"""Files that hold weights: folders, safetensors, streams, the hub, and what lies beside them."""
