"""gemma3: gemma3_text beside a vision tower."""

from kvfold.architectures._wrapped import Wrapped
from kvfold.architectures.gemma3_text import Gemma3Text


class Gemma3(Wrapped, Gemma3Text):
    model_type = "gemma3"
    causal_lm = "Gemma3ForConditionalGeneration"
