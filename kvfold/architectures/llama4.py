"""llama4 (Scout, Maverick): llama4_text beside a vision tower."""

from kvfold.architectures._wrapped import Wrapped
from kvfold.architectures.llama4_text import Llama4Text


class Llama4(Wrapped, Llama4Text):
    model_type = "llama4"
    causal_lm = "Llama4ForConditionalGeneration"
    base = "language_model.model"
    layers = "language_model.model.layers"
    rotary = "language_model.model.rotary_emb"
    beside = ("vision_model.", "multi_modal_projector.")
    renamed = {}  # noqa: RUF012
