"""Fold the packaged model to half of its cache, load the result with transformers alone, and generate with a batch.

python examples/fold_and_generate.py [OUT]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvfold
from kvfold.evaluation.demo import MODEL

out = sys.argv[1] if len(sys.argv) > 1 else "books-half"
recipe = kvfold.make_recipe(
    {
        "model": str(MODEL),
        "out": out,
        "preset": "svd_a",
        "kv_budget": "1/2",
        "calibration": {"data": "self", "num_samples": 32, "seq_len": 256},
    }
)
folded = kvfold.compress(recipe, overwrite=True)
print(f"{folded.plan.kv_bytes_per_token()} bytes per token instead of {folded.plan.source_kv_bytes_per_token()}")

model = AutoModelForCausalLM.from_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(out, padding_side="left", pad_token="<|endoftext|>")
batch = tokenizer(["The old man", "In the beginning of the year"], padding=True, return_tensors="pt")
result = model.generate(
    batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=32, pad_token_id=0,
    return_dict_in_generate=True,
)  # fmt: skip
for text in tokenizer.batch_decode(result.sequences, skip_special_tokens=True):
    print("-", " ".join(text.split()))
print(f"the cache of {tuple(result.sequences.shape)} tokens holds {result.past_key_values.nbytes} bytes")
