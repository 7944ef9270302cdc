"""Model families. One file is one Hugging Face model_type, and the only place that knows its tensor names."""
