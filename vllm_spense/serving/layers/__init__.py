"""The methods that run a layer of a model: one file per kind of layer, on the base in :mod:`.method`."""
