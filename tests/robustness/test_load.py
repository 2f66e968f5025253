"""The random load on the server, for a moment: no fault is found, and a wrong answer is."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace
from pathlib import Path

import httpx

from meteora_core.serving.app import AppOptions
from meteora_core.serving.guard import Access
from support.chat_world import build_world, byte_tokenizer, open_chat_model
from support.server import running_server

from .load import KEY, Idle, Known, Load, growth, known_answers, text_of, wait_until_idle


def test_the_load_finds_no_fault_and_would_find_a_crossed_answer(tmp_path: Path) -> None:
    model = open_chat_model(build_world(tmp_path))
    draw = random.Random(3)
    known = known_answers(model.model, 12, draw)
    with running_server(model, AppOptions(Access((KEY,))), max_batch=4, max_queue=12) as server:
        load, sent = Load(server.url, known, text_of(byte_tokenizer()), draw), itertools.count()
        asyncio.run(load.run(6, lambda: next(sent) < 90))
        assert load.faults == []
        assert {kind.split(":")[0] for kind in load.counts} >= {"whole", "stream", "vanished", "malformed"}
        assert wait_until_idle(server.url, KEY) is None

        crossed = [replace(known[0], tokens=known[1].tokens), *known[1:]]

        async def ask(entry: Known) -> None:
            async with httpx.AsyncClient(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
                watcher = Load(server.url, [entry], load.text, random.Random(1))
                await watcher._whole(client)
                load.faults.extend(watcher.faults)

        for entry in crossed:
            asyncio.run(ask(entry))
        assert len(load.faults) == 1
        assert load.faults[0].startswith(("wrong", "crossed"))


def test_growth_is_the_slope_after_the_first_fifth() -> None:
    flat = [Idle(60.0 * step, 300.0 if step else 100.0, 8, 4) for step in range(60)]
    assert growth(flat) == 0
    rising = [Idle(point.seconds, 300 + point.seconds / 360, 8, 4) for point in flat]
    assert abs(growth(rising) - 10) < 1e-9
