"""The model: a Llama-style decoder, cut by layers, and its Hugging Face form."""
