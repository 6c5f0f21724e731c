"""Weight-name tables between Hugging Face and Megatron, one file a family, each read in both directions."""
