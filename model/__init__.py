"""A Mistral language model: weights, tokenizer, cache and sampler. It knows nothing of SPIN or of ranks."""
