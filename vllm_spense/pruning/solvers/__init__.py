"""From a weight and the statistics of its inputs to a weight that obeys its layout."""
