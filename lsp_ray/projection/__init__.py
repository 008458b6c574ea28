"""(d, r)-sparse projectors: their products, how they are learned, how they are stored."""
