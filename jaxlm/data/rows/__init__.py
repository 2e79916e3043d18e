"""The rows of a run, composed of packing, fill-in-the-middle, curriculum and mixture; and ways to look at them."""
