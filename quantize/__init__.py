"""FLOAT IN, CODES OUT: grids, methods and the run loop."""
