"""Which weights stay dense: indices of MLPs and groups of heads, layer by layer or under one budget."""
