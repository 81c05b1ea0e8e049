"""SESSION IN, RESULT OUT: speed and fidelity, measured."""
