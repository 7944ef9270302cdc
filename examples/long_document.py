"""Read a long document with a cache of which every head keeps the tokens that it needs, and ask questions about it.

python examples/long_document.py DOCUMENT [MODEL] [OUT] [TEXT TO CALIBRATE ON]
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvfold

DOCUMENT = Path(sys.argv[1]).read_text()
MODEL, OUT, TEXT = [
    *sys.argv[2:],
    *["HuggingFaceTB/SmolLM2-135M-Instruct", "long-quarter", "self"][len(sys.argv) - 2 :],
]
QUESTIONS = ["Who is it about?", "How does it begin?"]
CONTEXT = 1024

if not Path(OUT).exists():
    # a quarter of the bytes at so many tokens: heads that look far back keep more tokens than those that do not
    shares = {"model": MODEL, "out": OUT, "preset": "observed", "kv_budget": "1/4", "context_len": CONTEXT}
    kvfold.compress(shares | {"calibration": {"data": TEXT}})

model, tokenizer = AutoModelForCausalLM.from_pretrained(OUT), AutoTokenizer.from_pretrained(OUT)
document = tokenizer(DOCUMENT, return_tensors="pt").input_ids[:, :CONTEXT]
cache = kvfold.FoldedCache(model.kv_plan)
with torch.no_grad():
    model(document, past_key_values=cache, logits_to_keep=1)  # read once; what of it stays is chosen here
whole = model.kv_plan.source_kv_bytes(document.shape[1])
print(f"{document.shape[1]:,} tokens are held in {cache.nbytes / 1e6:.1f} MB instead of {whole / 1e6:.1f} MB.")
for question in QUESTIONS:  # each of a copy, so that answers do not depend on what was asked before
    asked = tokenizer(f"\n\n{question} ", return_tensors="pt", add_special_tokens=False).input_ids
    tokens = torch.cat([document, asked], dim=1)
    answer = model.generate(tokens, past_key_values=copy.deepcopy(cache), max_new_tokens=24, do_sample=False)
    print("-", question, " ".join(tokenizer.decode(answer[0, tokens.shape[1] :], skip_special_tokens=True).split()))
