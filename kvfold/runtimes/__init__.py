"""What runs a plan: the oracle, transformers, vLLM, and their kernels. Never a method, a recipe or a stage."""
