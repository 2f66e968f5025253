"""Extraction of the response text from a decoded model output."""

from __future__ import annotations

import re
from typing import Any

from meteora_core.choices import Scoring
from meteora_core.evaluation.metrics import as_text

PROMPT_END = "[/INST]\n"
"""End of the prompt template."""

_END_TOKENS = ("</s>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "<eos>")
_START_TOKENS = ("<s>", "<|begin_of_text|>", "<|im_start|>", "<bos>", "<start_of_turn>", "<|start_header_id|>")
_END = re.compile("|".join(map(re.escape, _END_TOKENS)))
_LEADING = re.compile(
    r"(?:\s*(?:"
    r"<\|im_start\|>(?:system|user|assistant)?\n?"
    r"|<\|start_header_id\|>\w*<\|end_header_id\|>\s{0,2}"
    r"|<start_of_turn>(?:user|model)?\n?"
    r"|<s>|<bos>|<\|begin_of_text\|>|<pad>|<unk>|<\|pad\|>|<\|finetune_right_pad_id\|>"
    rf"|{_END.pattern}"
    r"))+"
)


def _without_special_tokens(text: str) -> str:
    """Remove the special tokens at the start of a response, and everything from the first end token on."""
    if "<" not in text:
        return text
    leading = _LEADING.match(text)
    if leading:
        text = text[leading.end() :]
    end = _END.search(text)
    return text[: end.start()] if end else text


def clean_response(task: str, output: Any, prompt: Any, scoring: Scoring = "corrected") -> str:
    """Extract the response text from a decoded model output.

    The output may or may not repeat the prompt:

    - If it contains the prompt word for word, every copy of the prompt is removed and white space at both ends is stripped.
    - Otherwise, if decoding has changed the prompt, everything up to the last ``[/INST]`` and its line end is removed.
    - Otherwise the output is the response, without the prompt if it begins with the prompt stripped of white space at both ends.

    Letter case and all other white space are kept. The text of special tokens (``<s>``, ``</s>``, ``<|im_end|>``, ``<|end_of_text|>``, chat headers and the
    like) is removed at the start, and the response ends before the first end token. Outputs decoded with ``skip_special_tokens=True`` contain none.

    Args:
        task: Name of the task. It matters only for ``"paper"``, which has a special rule for formal_fallacies_syllogisms_negation.
        output: The decoded output; None counts as empty.
        prompt: The prompt that was given to the model.
        scoring: ``"corrected"``, or ``"paper"`` for exactly the authors' rules: special tokens are kept, the response is lower-cased if the prompt or its
            end was found, and an output without either is returned unchanged. A response to formal_fallacies_syllogisms_negation then becomes "invalid" if
            it contains that word, else "valid" if it contains that one, else "illegal answer". Responses to be scored with ``scoring="paper"`` must be
            cleaned with it, because they are scored as they are.

    Returns:
        The response text.
    """
    output, prompt = as_text(output), as_text(prompt)
    if scoring == "paper":
        cleaned = _paper(output, prompt)
        return _verdict(cleaned) if task == "formal_fallacies_syllogisms_negation" else cleaned
    if prompt and prompt in output:
        bare = prompt.strip()
        before, _, after = output.strip().partition(bare) if bare else ("", "", output)
        before = _LEADING.sub("", before) if "<" in before else before
        rest = _without_special_tokens(after)
        return (before + (rest.replace(bare, "") if bare else rest)).strip()
    at = output.rfind(PROMPT_END)
    if at >= 0:
        return _without_special_tokens(output[at + len(PROMPT_END) :])
    bare = prompt.strip()
    if bare:
        lead = _LEADING.match(output)
        start = lead.end() if lead else 0
        start += len(output[start:]) - len(output[start:].lstrip())
        if output.startswith(bare, start):
            return _without_special_tokens(output[start + len(bare) :]).strip()
    return _without_special_tokens(output)


def _paper(output: str, prompt: str) -> str:
    if prompt in output:
        return output.strip().replace(prompt.strip(), "").strip().lower()
    at = output.rfind(PROMPT_END)
    return output if at < 0 else output[at + len(PROMPT_END) :].lower()


def _verdict(response: str) -> str:
    """The authors' interpretation of an answer about formal fallacies, which is case-sensitive."""
    return next((word for word in ("invalid", "valid") if word in response), "illegal answer")


def answer_only(response: str) -> str:
    """Cut a response before the first ``[INST]``, where the model begins to write another request."""
    return response.partition("[INST]")[0] if "[INST]" in response else response
