"""Fold an instruct model to a quarter of its cache, and talk to it.

python examples/fold_and_chat.py [MODEL] [OUT] [TEXT TO CALIBRATE ON]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import kvfold

MODEL, OUT, TEXT = [
    *sys.argv[1:],
    *["HuggingFaceTB/SmolLM2-135M-Instruct", "chat-quarter", "self"][len(sys.argv) - 1 :],
]

if not Path(OUT).exists():
    # "self": the model writes its own calibration text, half of it conversations; a text of what it will see is better
    folded = kvfold.compress({"model": MODEL, "out": OUT, "kv_budget": "1/4", "calibration": {"data": TEXT}})
    before, after = folded.plan.source_kv_bytes(32768), folded.plan.kv_bytes(32768)
    print(f"32,768 tokens take {after / 1e6:,.0f} MB instead of {before / 1e6:,.0f} MB.")

model, tokenizer = AutoModelForCausalLM.from_pretrained(OUT), AutoTokenizer.from_pretrained(OUT)
conversation = []
for line in sys.stdin:  # type, or pipe lines in; an end of file ends it
    conversation.append({"role": "user", "content": line.strip()})
    prompt = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = model.generate(**prompt, max_new_tokens=128, do_sample=False, streamer=streamer)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    conversation.append({"role": "assistant", "content": answer})
