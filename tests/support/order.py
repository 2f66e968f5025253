"""The order in which test files begin."""

from __future__ import annotations

FIRST = (
    "test_end_to_end.py",
    "test_train_command.py",
    "test_decode_chosen_rows.py",
    "test_campaign.py",
    "test_feeders.py",
    "test_wide.py",
    "test_packed.py",
    "test_split.py",
    "test_paper_toy.py",
    "test_many_adapters.py",
    "test_layer_paths.py",
    "test_stages.py",
    "test_real_bigbench.py",
    "test_eval_command.py",
    "test_fuse.py",
    "test_wide_before.py",
    "test_one_launch.py",
    "test_real_model_batches.py",
    "test_sharding.py",
    "test_chat_command.py",
    "test_parallel_adapters.py",
    "test_lm_eval_model.py",
    "test_evaluate.py",
    "test_engine_answer.py",
    "test_token_cache.py",
)
"""The files that take longest go first: the many short ones behind them end together on all workers."""
