"""Single query tokens share keys and values in SDPA attention with transformers before 5.23, as they do from 5.23 on (`pack_gqa`).

Older versions repeat keys and values for every query head at every step of a decode with a mask, which is most of the memory traffic of long prompts.
Python imports a module of this name at its start if its folder is on PYTHONPATH; run.sh puts it there. PACK_GQA=0 turns it off.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

NAME = "transformers.integrations.sdpa_attention"


def pack(module):
    """Let the module's attention treat the query heads of a key head as queries if there is one query token."""
    import torch

    if hasattr(module, "pack_gqa"):
        return
    original = module.sdpa_attention_forward

    def sdpa_attention_forward(layer, query, key, value, attention_mask, dropout=0.0, scaling=None, **others):
        groups = getattr(layer, "num_key_value_groups", 1)
        if groups == 1 or query.shape[2] != 1 or attention_mask is None or attention_mask.shape[1] != 1 or any(other is not None for name, other in others.items() if name == "position_bias"):
            return original(layer, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
        batch, heads, _, size = query.shape
        packed = query.reshape(batch, heads // groups, groups, size)
        done = torch.nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
        return done.reshape(batch, heads, 1, value.shape[-1]).transpose(1, 2).contiguous(), None

    module.sdpa_attention_forward = sdpa_attention_forward


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module as usual, and changes it once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            pack(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("PACK_GQA", "1") == "1":
    sys.meta_path.insert(0, Finder())

# This module hides one of the same name that the machine may have, so that one runs too.
other = importlib.machinery.PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))])
if other is not None and other.loader is not None:
    other.loader.exec_module(importlib.util.module_from_spec(other))
