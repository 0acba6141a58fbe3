"""A linear layer on a Spense weight: its definition, its back ends, and their tuning."""
