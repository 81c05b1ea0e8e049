"""Mobile-size variants: less vocabulary, less width, adapters merged, and what quantization hurt made good."""
