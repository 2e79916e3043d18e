"""State-space scans: the causal convolution, the selective scan of Mamba, the SSD scan of Mamba-2."""
