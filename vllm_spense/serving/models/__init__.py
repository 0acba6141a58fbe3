"""Models that vLLM does not have."""
