"""THE NOUNS: what every room speaks of; numpy only, imports no other room."""
