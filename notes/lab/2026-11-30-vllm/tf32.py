"""How many greedy answers of check.py's model change on a CPU if the products of attention are in TF32. First: python check.py float32 make (folder /tmp/mc)."""
import random
import re
import sys
from pathlib import Path

import torch
import transformers
from transformers.models.llama import modeling_llama as llama

sys.argv = ["check.py", "float32", "none"]
source = Path(__file__).with_name("check.py").read_text().replace(".cuda()", "").replace('"cuda"', '"cpu"').replace("torch.cuda.empty_cache()", "None")
source = source.replace('attn_implementation="sdpa"', 'attn_implementation="tf32"')
source = re.sub(r"PROMPTS, NEW = 4, 10, .*", "PROMPTS, NEW = 4, 10, 100, 12", source)
names = {"__name__": "check"}
exec(compile(source, "check.py", "exec"), names)
names["OPTS"] = {"default": {}, "off": {}}
rounding = [False]


def tf32(tensor):
    """Round to ten bits of mantissa."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    near = tf32 if rounding[0] else (lambda tensor: tensor)
    key, value = llama.repeat_kv(key, module.num_key_value_groups), llama.repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(near(query), near(key).transpose(2, 3)) * scaling
    rows, columns = scores.shape[-2:]
    scores = scores.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows), float("-inf"))
    return torch.matmul(near(torch.softmax(scores, -1)), near(value)).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("tf32", attention)
generator = random.Random(1)
prompts = [[generator.randrange(3, 4096) for _ in range(generator.choice([7, 20, 33, 64]))] for _ in range(100)]
exact = names["reference"](prompts, torch.float32)
rounding[0] = True
rounded = names["reference"](prompts, torch.float32)
for kind in exact:
    pairs = list(zip(exact[kind], rounded[kind]))
    margins = [one[1][next(i for i in range(12) if one[0][i] != other[0][i])] for one, other in pairs if one[0] != other[0]]
    print(kind, "equal", len(pairs) - len(margins), "of", len(pairs), "largest margin at a first difference", round(max(margins, default=0), 4))
