"""qwen3_vl: qwen3 beside a vision tower, with positions along three axes."""

from kvfold.architectures._several_positions import SeveralPositions


class Qwen3Vl(SeveralPositions):
    model_type = "qwen3_vl"
    causal_lm = "Qwen3VLForConditionalGeneration"
