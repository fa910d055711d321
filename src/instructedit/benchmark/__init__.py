"""How fast editing is: the engine beside a plain implementation, on the same weights, records, rank and threads."""
