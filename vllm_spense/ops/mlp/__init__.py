"""More of an MLP than one linear layer in one operator."""
