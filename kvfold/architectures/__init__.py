"""What one Hugging Face model_type looks like, one file per family."""
