"""cohere (Command R, R+): as llama, with interleaved rotation; R+ has norms of its own for every head."""

from kvfold.architectures._interleaved import Interleaved
from kvfold.architectures._own_norms import OwnNorms


class Cohere(OwnNorms, Interleaved):
    model_type = "cohere"
    causal_lm = "CohereForCausalLM"
    tables_interleaved = True
    sums_late = True
    norm_field = "use_qk_norm"
