"""Load an artifact and generate text with it.

    python examples/load_and_generate.py [ARTIFACT]

`cptq.load` opens every directory that cptq reads or writes. A portable artifact (of the default
runtime) also loads with `AutoModelForCausalLM.from_pretrained` where cptq is not installed.
"""

import sys

from transformers import AutoTokenizer

import cptq

ARTIFACT = (*sys.argv[1:], "example-4bit")[0]

print("intact:", cptq.verify(ARTIFACT).tensors, "tensors as written")
held = cptq.inspect(ARTIFACT)
print(f"{held.nbytes:,} bytes, {held.bits:.2f} bits a weight")

model = cptq.load(ARTIFACT)
tokenizer = AutoTokenizer.from_pretrained(ARTIFACT)
prompt = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
