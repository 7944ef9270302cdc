"""qwen2_5_vl: qwen2 beside a vision tower, with positions along three axes."""

from kvfold.architectures._several_positions import SeveralPositions


class Qwen25Vl(SeveralPositions):
    model_type = "qwen2_5_vl"
    causal_lm = "Qwen2_5_VLForConditionalGeneration"
