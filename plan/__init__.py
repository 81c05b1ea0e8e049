"""WHAT WILL HAPPEN, known before any weight is read."""
