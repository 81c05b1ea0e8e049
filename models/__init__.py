"""THE FLOAT MODEL: checkpoints read lazily and checked, families, decoder blocks, tokenizers."""
