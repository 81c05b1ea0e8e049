"""ARTIFACT IN, SESSION OUT: one adapter a file."""
