"""mistral3 (Mistral-Small-3.1): mistral beside a vision tower."""

from kvfold.architectures._wrapped import Wrapped
from kvfold.architectures.mistral import Mistral


class Mistral3(Wrapped, Mistral):
    model_type = "mistral3"
    causal_lm = "Mistral3ForConditionalGeneration"
